"""Machines as cluster files describe them (`configs/clusters`), and how long the engine's work takes there."""

from engine.clusters.cluster import Cluster as Cluster
from engine.clusters.read import read_cluster as read_cluster
