"""Output of jobs: captured into one file per app, read back from there by everybody who wants it.

The file is the only queue: attachments and sinks are readers with a position of their own, so a slow one delays nobody,
and history and following are the same thing. spec/host.md section 13.
"""
