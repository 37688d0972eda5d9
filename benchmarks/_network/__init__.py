"""What benchmarks/network.py is made of: wires that delay, the ranks, the model that is fitted to what they took."""
