"""Carries out a Dockerfile's instructions in Debian roots; one method for each instruction."""

import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from deploy.image_check.container import Container
from deploy.image_check.context import context_files
from deploy.image_check.dockerfile import Instruction, expand
from deploy.image_check.machine import MOUNTED_AT, Machine

_BASE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass
class Stage:
    """What a FROM begins: its root, and what later instructions have set. The last is the image."""

    root: Path
    env: dict[str, str] = field(default_factory=lambda: {"PATH": _BASE_PATH})
    args: dict[str, str] = field(default_factory=dict)
    user: str = "0:0"
    workdir: str = "/"
    volumes: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    @property
    def values(self) -> dict[str, str]:
        """What $NAME means: variables hide build arguments."""
        return self.args | self.env

    def path(self, inside: str) -> Path:
        """Where a path of the image, relative to its working directory, lies on this machine."""
        return self.root / (Path(self.workdir) / inside).relative_to("/")


class Builder:
    """Builds the stages of one Dockerfile below `folder`; `report` is told of each step."""

    def __init__(
        self,
        context: Path,
        folder: Path,
        build_args: dict[str, str],
        machine: Machine,
        report: Callable[[str], None],
    ) -> None:
        self._context = context
        self._folder = folder
        self._build_args = build_args
        self._machine = machine
        self._report = report
        self._global_args: dict[str, str] = {}
        self._stages: dict[str, Stage] = {}
        self._steps: dict[str, Callable[[Stage, Instruction], None]] = {
            "ARG": self._arg,
            "CMD": self._cmd,
            "COPY": self._copy,
            "ENTRYPOINT": self._entrypoint,
            "ENV": self._env,
            "EXPOSE": self._expose,
            "HEALTHCHECK": self._healthcheck,
            "RUN": self._run,
            "USER": self._user,
            "VOLUME": self._volume,
            "WORKDIR": self._workdir,
        }

    def build(self, instructions: list[Instruction]) -> Stage:
        """The last stage. Raises DockerfileError, and CalledProcessError if debootstrap fails."""
        self._check_build_args(instructions)
        stage: Stage | None = None
        for instruction in instructions:
            started = time.monotonic()
            if instruction.name == "FROM":
                stage = self._from(instruction)
            elif stage is not None:
                self._steps[instruction.name](stage, instruction)
            else:
                self._global_arg(instruction)
            text = " ".join(instruction.text.split())
            took = time.monotonic() - started
            self._report(f"line {instruction.line:2} {instruction.name} {text[:64]} ({took:.1f} s)")
        assert stage is not None
        return stage

    def _check_build_args(self, instructions: list[Instruction]) -> None:
        names = {step.text.partition("=")[0] for step in instructions if step.name == "ARG"}
        for name in self._build_args.keys() - names:
            known = ", ".join(sorted(names))
            raise instructions[0].error(f"there is no build argument {name}, only {known}")

    def _global_arg(self, instruction: Instruction) -> None:
        if instruction.name != "ARG":
            raise instruction.error("only ARG may stand before FROM")
        name, _, default = instruction.text.partition("=")
        self._global_args[name] = self._build_args.get(name, default)

    def _from(self, instruction: Instruction) -> Stage:
        image, *rest = expand(instruction, instruction.text, self._global_args).split()
        name = rest[1] if len(rest) == 2 and rest[0] == "AS" else f"stage-{instruction.line}"
        root = self._folder / name
        subprocess.run(["cp", "-a", str(self._base(instruction, image)), str(root)], check=True)
        stage = self._stages[name] = Stage(root)
        return stage

    def _base(self, instruction: Instruction, image: str) -> Path:
        """A root with what Debian's image of that name holds: the packages of `minbase`."""
        distribution, _, tag = image.partition(":")
        suite = tag.removesuffix("-slim")
        if distribution != "debian" or not suite.isalpha():
            raise instruction.error(f"{image}: only debian:SUITE and debian:SUITE-slim are known")
        root = self._folder / f"base-{suite}"
        if not root.exists():
            mirror = self._machine.apt_mirror
            with (self._folder / "debootstrap.log").open("w") as log:
                command = ["debootstrap", "--variant=minbase", suite, str(root), mirror]
                subprocess.run(command, check=True, stdout=log)
            (root / "etc/apt/apt.conf.d/90machine").write_text(self._machine.apt_options)
        return root

    def _arg(self, stage: Stage, instruction: Instruction) -> None:
        name, has_default, default = instruction.text.partition("=")
        if name in self._build_args:
            stage.args[name] = self._build_args[name]
        elif name in self._global_args:
            stage.args[name] = self._global_args[name]
        elif has_default:
            stage.args[name] = default

    def _run(self, stage: Stage, instruction: Instruction) -> None:
        mounts = [self._secret(instruction, text) for _, text in instruction.options]
        container = Container(
            root=stage.root,
            env=self._machine.proxies | stage.values,
            user=stage.user,
            workdir=stage.workdir,
            binds=(*self._machine.mounts, *mounts),
        )
        running = container.start(["/bin/sh", "-c", instruction.text])
        try:
            status = running.process.wait()
        finally:
            running.kill()
        if status != 0:
            raise instruction.error(f"ended with status {status}")
        for _, target in mounts:
            (stage.root / target.relative_to("/")).unlink()
        shutil.rmtree(stage.root / MOUNTED_AT.relative_to("/"), ignore_errors=True)

    def _secret(self, instruction: Instruction, text: str) -> tuple[Path, Path]:
        given = dict(part.split("=", 1) for part in text.split(","))
        if given.keys() != {"type", "id", "target"} or given["type"] != "secret":
            raise instruction.error(f"--mount={text}: only type=secret,id=…,target=… is known")
        if given["id"] not in self._machine.secrets:
            raise instruction.error(f"there is no secret {given['id']}")
        return self._machine.secrets[given["id"]], Path(given["target"])

    def _copy(self, stage: Stage, instruction: Instruction) -> None:
        *sources, target = (expand(instruction, word, stage.values) for word in instruction.words)
        origin = dict(instruction.options).get("from")
        folder = stage.path(target)
        if origin is not None:
            if origin not in self._stages or len(sources) != 1:
                raise instruction.error("one folder of an earlier stage is what is known here")
            shutil.copytree(self._stages[origin].path(sources[0]), folder, symlinks=True)
            return
        if not target.endswith("/"):
            raise instruction.error("end the target in / to say that it is a folder")
        for source in sources:
            self._copy_context(instruction, Path(source), folder)

    def _copy_context(self, instruction: Instruction, source: Path, folder: Path) -> None:
        """A file goes into `folder`; of a folder, what it holds does."""
        is_folder = (self._context / source).is_dir()
        inside = source if is_folder else source.parent
        wanted = [
            path
            for path in context_files(self._context)
            if path == source or source in path.parents
        ]
        if not wanted:
            raise instruction.error(f"{source} is not in the context, or .dockerignore hides it")
        for path in wanted:
            target = folder / path.relative_to(inside)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(self._context / path, target)

    def _env(self, stage: Stage, instruction: Instruction) -> None:
        for word in instruction.words:
            name, _, value = word.partition("=")
            stage.env[name] = expand(instruction, value, stage.values)

    def _user(self, stage: Stage, instruction: Instruction) -> None:
        stage.user = instruction.text

    def _workdir(self, stage: Stage, instruction: Instruction) -> None:
        stage.workdir = str(Path(stage.workdir) / instruction.text)
        stage.path(".").mkdir(parents=True, exist_ok=True)

    def _volume(self, stage: Stage, instruction: Instruction) -> None:
        stage.volumes += instruction.words

    def _expose(self, stage: Stage, instruction: Instruction) -> None:
        """Documents ports; nothing to do."""

    def _healthcheck(self, stage: Stage, instruction: Instruction) -> None:
        _, _, command = instruction.text.partition("CMD ")
        stage.healthcheck = replace(instruction, text=command).command

    def _entrypoint(self, stage: Stage, instruction: Instruction) -> None:
        stage.entrypoint = instruction.command

    def _cmd(self, stage: Stage, instruction: Instruction) -> None:
        stage.command = instruction.command
