"""A teacher behind a server: questions, answers, and the file that `--teacher-logprobs` reads.

`ask` reads the frozen contexts of a run and asks a server for the log-probabilities of the
likeliest tokens at every response position. `connection` is the only module of the package that
opens a connection, and only to the URL that the command was given. `dialects` says what is asked
and how an answer is read; `spelling` compares the server's token texts with the student's
tokenizer."""
