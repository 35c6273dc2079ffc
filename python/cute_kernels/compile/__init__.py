"""From a row of the table of tiles to a compiled kernel: for the build, which CMake drives, and for
users' rows. Nothing in this package imports torch."""
