"""Rewards over HTTP: `marble serve` judges for runs on other machines or in other processes (`marble.rewards.remote`).

`POST /score` takes pictures and prompts and answers scores, `POST /applies` prompts alone; `GET /rewards` says what is
served, `GET /health` that it runs, `GET /metrics` how it goes (Prometheus). See `marble.rewards.wire` for the forms.
"""
