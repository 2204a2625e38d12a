"""The rules of jobs: life cycle, admission, environment, retention. Pure; `flynn.host.supervise` acts on them."""
