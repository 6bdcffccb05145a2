"""One training on a cluster: streams (Ray Data), worker and trainer (Ray Train), resources, metrics of the dashboard."""
