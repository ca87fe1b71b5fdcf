"""Kills, races, faults and outages: what holds whatever happens to the service or around it."""
