"""What moves enrollments: the loop, claims, leases, executors, results, rescheduling, lookups.

Imported by the console and the daemon.
"""
