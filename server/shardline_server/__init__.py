"""Front ends, engine process, launcher and command line."""
