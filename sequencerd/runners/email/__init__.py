"""The Email runner: messages, the SMTP client, and the classification of refusals.

Like all runners, it never accesses the database.
"""
