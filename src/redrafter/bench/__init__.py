"""Benchmarks of drafting methods: measurement, resumable records, and one report.  Needs the extra `bench`."""
