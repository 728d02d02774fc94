"""Watching runs over the network: an ASGI application, its page, and a sink and a command that serve it.

==========================================  ==================================================================
A request is checked and answered           `app`, with `access` (may it?), `responses` and `images` (how it is sent)
The runs of a folder are found              `runs`, with `summaries` for their entries in the list
A browser's frame is made                   `hub`, from the `view` of a run and its changes; `frames` keeps it
The journal feeds a hub                     `folder_hub`, with `stored` views, `trim` and `turns`
A client receives frames, sends commands    `client` and `clients`; `journal_body` for `connect`
A server runs the application               `server` and `protocols` for `stagecast watch` and the sink `Live`
A page becomes one file                     `report`
==========================================  ==================================================================
"""
