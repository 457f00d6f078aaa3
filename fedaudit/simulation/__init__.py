"""Engines that run a ServerApp and a ClientApp on this machine."""
