"""Proves the image's recipe where no container engine runs; `make image-check` is its command line.

`dockerfile` reads the recipe, `build` carries its steps out in a Debian root of debootstrap's,
`container` runs commands in what comes of it, `check` starts the server there and asks it. Standard
library only, and root's rights: it makes roots, mounts and namespaces.
"""
