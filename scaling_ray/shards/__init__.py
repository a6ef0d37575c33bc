"""Shards: raw counts of selected cells in one permutation per split, genes in rank order, as Parquet."""
