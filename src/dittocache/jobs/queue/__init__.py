"""Runs that wait in line for the device that they need: small files, and a process that starts them in turn.

    QUEUE/waiting/000007.json   a job that waits                QUEUE/add.lock     held while a job is numbered
    QUEUE/started/000007.json   one whose run was started       QUEUE/runner.lock  held by the process that starts jobs
    QUEUE/ended/000007.json     one whose run has ended, how    QUEUE/runner.log   what that process had to say

A job moves from one folder to the next by a rename, which happens or does not: whoever is ended at whatever moment, no
job is lost and none is run twice. How a started job stands is read from its run, never from here.
"""
