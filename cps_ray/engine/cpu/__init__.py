"""What only CPUs need: threads and memory, and a layer that torch computes slowly there."""
