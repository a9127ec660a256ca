"""The calendar: time zones, date arithmetic, parsing, and the next matching time.

Pure; gives moment's answers with zoneinfo.
"""
