"""Kills, races, faults and outages: the guarantees that hold all the same."""
