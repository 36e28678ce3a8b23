"""The web UI: pages only. What they show is read from run folders; what they start is started by `jobs`.

app.py       the application: pages, endpoints, server
state.py     what the Studio knows: the allowed folders, the draft of a run's settings, the folder of runs
draft.py     the draft on disk, so that a reload or a second tab shows the same
layout.py    what every page has around it: header, navigation, theme
safety.py    who may ask, and for which paths
pages/       one file a page, with `page(studio)`
parts/       pieces that several pages use: file chooser, thumbnails, settings form, live run
assets/      the style sheet
"""
