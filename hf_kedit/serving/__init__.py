"""An edited model as people talk to it: a server that speaks OpenAI's protocol, and a conversation in the terminal.

variants.py     one model in memory, shown with one set of edits or another, a turn for everybody who asks
answering.py    one prompt → text that grows, with log-probabilities, stop strings and an end on demand
protocol.py     what requests and answers look like; everything that is wrong with a request, before it is asked
app.py          the routes of the server (needs the extra `serve`)
running.py      a socket, a server on it, and how it ends
"""
