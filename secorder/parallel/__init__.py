"""Parameters and sums over the ranks of a process group."""
