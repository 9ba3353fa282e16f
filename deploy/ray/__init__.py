"""The server as an application of Ray Serve: replicas on many machines, with one view of the policies.

`app.build` makes the application. Only `app`, `actors` and `router` use Ray.
"""
