"""Profiles from routing that other programs recorded: counts, ids of experts, tables, dumps.

formats.py lists the formats. The reader of each turns a file into `CountedRouting` or `TracedRouting`; checks.py holds these against the
model's sizes and makes a profile's arrays of them, in one place for all formats. A file is not trusted: whatever it holds, the import
ends in a profile or in a RemoeError, no size in a header is used before it is compared with the file's, and no code of the file runs.
"""
