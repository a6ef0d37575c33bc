"""Cells in: the Census reader, planted and imported local Censuses, and the exact floor of a planted one."""
