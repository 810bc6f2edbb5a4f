"""Preparing a data set: check, re-encode, list and index its videos."""
