"""Files of many samples, tar or parquet, each with an index beside it, read at random places."""
