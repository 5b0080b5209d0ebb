"""Serving a bundle over HTTP by OpenAI's protocol: requests in, rows of one batch, answers streamed.

settings    what bounds a server
refusal     what a request is refused with: OpenAI's error objects
fields      the members of a request's JSON, checked one by one
requests    what a request asks for
models      model names: the bundle's adapters, the base, and adapters that come while it runs
job         one text being generated: from logits to pieces of the answer
lanes       jobs that step together, and those that must run alone
engine      the thread that runs them: a queue, prompts chunk by chunk, a step for all rows
answers     pieces as OpenAI's objects, whole or as events of a stream
text_requests, text_response  from the JSON of a request to its job, and from the job to the client
admission   how many requests may be inside
embeddings  texts to vectors, for encoders
guard       who may ask: keys, hosts, how long a body may be
connection  what a slow or silent client may hold up
app         the routes
server      the port, and the end
"""
