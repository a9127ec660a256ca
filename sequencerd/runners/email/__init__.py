"""The Email runner: messages, the SMTP client, what refusals mean.

Like all runners it never sees the database.
"""
