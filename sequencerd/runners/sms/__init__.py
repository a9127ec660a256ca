"""The SMS runner: phone numbers, Twilio, HTTP gateways.

Like all runners it never sees the database.
"""
