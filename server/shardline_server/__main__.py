"""`python -m shardline_server` is the `shardline` command."""

from shardline_server.cli import main

main(prog_name="shardline")
