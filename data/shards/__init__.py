"""Tar files of samples in the layout of webdataset, each with an index beside it, read at random places."""
