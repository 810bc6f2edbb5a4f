"""The sub-commands of `octvideo`; tools/ has a script for each."""
