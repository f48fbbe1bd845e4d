"""Measures whole networks, fastconv against torch."""

import argparse


def main(arguments):
    """Runs the benchmark of networks. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="run.py models", description=__doc__)
    parser.parse_args(arguments)
    parser.error("there is nothing to measure yet")
