"""The SMS runner: phone numbers, Twilio, and HTTP gateways.

Like all runners, it never accesses the database.
"""
