"""The calendar: time zones, date arithmetic, parsing, the next matching time.

Pure; moment's answers on zoneinfo.
"""
