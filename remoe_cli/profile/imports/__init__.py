"""Profiles from routing that other programs recorded: counts, per-token ids, tables and servers' dumps.

One module a family of formats turns a file into `Counted` or `Traced` (rows.py), which are checked and brought to the profile's
arrays in one place. Nothing that a file holds is trusted: no input ends in anything but a profile or a RemoeError, no size is
believed before it is compared with the file's, and nothing is unpickled.
"""
