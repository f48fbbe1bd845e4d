"""Compares two results of the benchmark, row by row."""

import argparse


def main(arguments):
    """Prints what changed from one result to the other. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="run.py compare", description=__doc__)
    parser.add_argument("before", metavar="A.json")
    parser.add_argument("after", metavar="B.json")
    parser.parse_args(arguments)
    parser.error("there is no comparison yet")
