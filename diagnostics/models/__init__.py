"""A teacher and a student: loading, read-outs, named pairs, top-K teachers, templates."""
