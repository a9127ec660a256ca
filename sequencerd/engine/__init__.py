"""Move enrollments: the loop, claims, leases, executors, results, rescheduling and lookups.

Imported by the console and the daemon.
"""
