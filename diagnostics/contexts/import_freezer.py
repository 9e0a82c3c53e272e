"""Imported rows become frozen contexts: messages become text, and text becomes ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.contexts import sampled_logprobs
from diagnostics.contexts.conversations import CALLS, REASONING, parse_messages
from diagnostics.contexts.encoding import encode_prompt
from diagnostics.contexts.import_counts import COUNTED
from diagnostics.contexts.import_formats import Rollout
from diagnostics.contexts.prompt_ids import digest
from diagnostics.contexts.prompts import is_far_longer
from diagnostics.contexts.rendering import PROBE, Renderer
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.rows import missing, require_unicode
from diagnostics.core.types import Context, Prompt

if TYPE_CHECKING:
    from diagnostics.models.pair import Pair


TURNS = ("auto", "first", "all")
"""Which turns of a reply are kept: all where the student's tokens are told and else the first; the
first; all, or a refusal."""


class Freezer:
    """Turns imported rows into contexts and counts what it finds.

    Args:
        pair: Student and teacher; the tokenizer, the shared vocabulary and the window are
            theirs.
        renderer: Renders prompts and replies with the chat template.
        prompts: Prompts that the rollouts came from, to restore lost special tokens.
        turns: One of TURNS.
    """

    def __init__(
        self, pair: Pair, renderer: Renderer, prompts: Sequence[Prompt], *, turns: str = "auto"
    ):
        if turns not in TURNS:
            raise DiagnosticsError(
                f"turns is one of {', '.join(TURNS)}; got {turns!r}. Choose one of them."
            )
        self.turns = turns
        self.tokenizer: Any = pair.tokenizer
        self.end_ids = pair.end_ids
        self.vocabulary = pair.vocabulary
        self.window = pair.window
        self.renderer = renderer
        self.teacher_renderer, self.teacher_tokenizer = (
            renderer,
            pair.teacher_reads or pair.tokenizer,
        )
        if getattr(pair.teacher_reads, "chat_template", None):
            kwargs = dict(renderer.arguments)
            self.teacher_renderer = Renderer(pair.teacher_reads, renderer.wraps_text, kwargs)
        self.counts: Counter = Counter()
        renderer.written.update(prompt.prompt for prompt in prompts if prompt.rendered)
        self.stripped = {self._stripped(prompt.prompt): prompt for prompt in prompts}
        self.writes_special = renderer.has_template and renderer.has_special(
            "".join(renderer.frame)
        )
        self.pad = getattr(self.tokenizer, "pad_token_id", None)
        self.fillers = {*self.end_ids} | ({self.pad} - {None})
        self.seen: set[tuple] = set()

    def __call__(self, rollout: Rollout, where: str) -> Context | None:
        """Return the context of a row, or None where the row is left out. Raises DiagnosticsError
        where a token id lies outside the shared vocabulary.
        """
        with_reply = self._with_reply(rollout, where)
        if with_reply is None:
            return None
        rollout = self._with_prompt(with_reply, where)
        if self._cannot_fit(rollout):
            self.counts["over_long"] += 1
            return None
        prompt_ids, given_ids = self._ids(rollout)
        rollout = self._with_teacher_ids(rollout, where)
        outside = [
            i
            for i in (*prompt_ids, *given_ids, *(rollout.teacher_prompt_ids or ()))
            if i >= self.vocabulary
        ]
        if outside:
            raise DiagnosticsError(
                f"{where} holds token id {outside[0]}, and the shared vocabulary has"
                f" {self.vocabulary}. Another tokenizer wrote it; give the text alone."
            )
        if rollout.exact and self.turns != "first":
            own, response_ids, teacher_ids = rollout.own, given_ids, rollout.teacher_prompt_ids
            own = None if own is None or all(own) else own
        else:
            part, own = self._students_part(given_ids, rollout.own)
            prompt_ids, response_ids, teacher_ids = self._without_padding(
                prompt_ids, part, rollout.teacher_prompt_ids, whole=own is not None
            )
        self.counts["turns"] += own is not None
        rollout = replace(rollout, teacher_prompt_ids=teacher_ids)
        usable = self._usable(max(prompt_ids, teacher_ids or (), key=len), response_ids)
        if usable:
            self._count_faults(rollout, prompt_ids, response_ids, given_ids)
        if not usable:
            return None
        values = self._logprobs(rollout, given_ids, response_ids)
        return replace(
            self._context(rollout, prompt_ids, response_ids, own), sampled_logprobs=values
        )

    def counted(self) -> dict[str, int]:
        """Return what was found, by the names of COUNTED."""
        of_prompts = {f"prompts_{name}": count for name, count in self.renderer.counts.items()}
        return {name: self.counts[name] + of_prompts.get(name, 0) for name in COUNTED}

    # Messages become text.

    def _with_reply(self, rollout: Rollout, where: str) -> Rollout | None:
        """Replace a reply in messages by the text of its first message, which the student wrote;
        None where that text cannot be determined.
        """
        if rollout.reply is None:
            return rollout
        messages = self.renderer.messages(rollout.reply, f"{where}, the reply")
        own = messages[:1] if messages[0]["role"] == "assistant" else []
        if self.turns != "first" and any(each["role"] == "assistant" for each in messages[1:]):
            whole = self._with_turns(rollout, messages, where)
            if whole is not None:
                return whole
            self.counts["turns_left_out"] += 1
        self.counts["cut"] += len(messages) > len(own)
        text = self._written(rollout, own[0], where) if own else ""
        return None if text is None else replace(rollout, response=text)

    def _with_turns(self, rollout: Rollout, messages: list[dict], where: str) -> Rollout | None:
        """Replace a reply in several messages by its ids and the mask of the student's tokens, as
        the chat template writes and marks them. None where it does not, and `all` is not asked for.
        """
        arguments = self.renderer.arguments | rollout.arguments
        template = self.renderer.template
        if self.turns == "auto" and not template.marks_replies(arguments):
            return None
        prompt = parse_messages(rollout.prompt, where)
        if isinstance(prompt, str) or missing(prompt):
            self._refuse_untold(where, "its prompt is text, which is not rendered again")
            return None
        asked = self.renderer.messages(prompt, where)
        if self.renderer.continues(asked, arguments):
            self._refuse_untold(where, "its prompt ends with the beginning of the first of them")
            return None
        asked = self.renderer.question(asked)
        before = self.renderer(asked, where, rollout.arguments, count=False)
        passed = {
            name: value for name, value in arguments.items() if name != "continue_final_message"
        }
        text, spans = template.marked([*asked, *messages], where, **passed)
        spans = [(max(first, len(before)), last) for first, last in spans if last > len(before)]
        if not text.startswith(before) or not spans:
            self._refuse_untold(where, "the chat template writes the prompt otherwise before it")
            return None
        prompt_ids = self._encode_prompt(before)
        ids, own = self._marked_ids(text[: spans[-1][1]], len(before), prompt_ids, spans)
        self.renderer(asked, where, rollout.arguments)  # counts what became of the prompt
        self.counts["from_text"] += 1
        self.counts["cut"] += messages[-1]["role"] != "assistant"
        return replace(
            rollout,
            prompt=before,
            prompt_ids=prompt_ids,
            reply=None,
            response=None,
            response_ids=ids,
            own=own,
        )

    def _refuse_untold(self, where: str, why: str) -> None:
        """Refuse a reply of several messages where all are asked for."""
        if self.turns == "all":
            raise DiagnosticsError(
                f"{where} has a reply of several messages, and {why}. Give response_ids with a"
                " loss_mask, or take the first message alone with --turns first."
            )

    def _marked_ids(
        self,
        text: str,
        start: int,
        prompt_ids: tuple[int, ...],
        spans: list[tuple[int, int]],
    ) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        """Encode a reply behind its prompt, and tell the tokens that begin within a span.

        Args:
            text: Prompt and reply.
            start: Characters of the prompt.
            prompt_ids: Ids of the prompt.
            spans: First and last character (exclusive) of what the student writes.
        """
        ids, places = self._encode_with_places(text)
        first = len(prompt_ids)
        if ids[:first] != prompt_ids:
            self.counts["joined"] += 1
            ids, places = self._encode_with_places(text[start:])
            first, spans = 0, [(a - start, b - start) for a, b in spans]
        own = tuple(any(a <= place < b for a, b in spans) for place in places[first:])
        return ids[first:], own

    def _encode_with_places(self, text: str) -> tuple[tuple[int, ...], list[int]]:
        """Ids of a text, and the character at which each begins."""
        require_unicode(text)
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return tuple(found["input_ids"]), [first for first, _ in found["offset_mapping"]]

    def _written(self, rollout: Rollout, message: dict, where: str) -> str | None:
        """Return a message's text with its reasoning and tool calls as the template writes them;
        None where the reasoning is lost.
        """
        content = message.get("content") or ""
        content = (
            content if isinstance(content, str) else "\n".join(block["text"] for block in content)
        )
        thought = {name for name in REASONING if message.get(name)}
        calls = {name for name in CALLS if name in message}
        if not thought and not calls:
            return content
        text = self._rewritten(rollout, message, thought, where) if thought else content
        with_calls = (
            self._rewritten(rollout, message, calls, where) if calls and text is not None else text
        )
        lost = text is None or with_calls is None
        self.counts["unwritten" if lost else "rewritten"] += 1
        if with_calls is not None or text is None:
            return with_calls
        bare = {key: value for key, value in message.items() if key not in CALLS}
        return self._rewritten(rollout, bare, thought, where) if thought else content

    def _rewritten(
        self, rollout: Rollout, message: dict, parts: set[str], where: str
    ) -> str | None:
        """Return what the template writes for a reply after asking for it; None where nothing of
        the `parts` is in it.
        """
        prompt = parse_messages(rollout.prompt, where)
        arguments = self.renderer.arguments | rollout.arguments
        if isinstance(prompt, str) or missing(prompt):
            return None
        messages = self.renderer.messages(prompt, where)
        if self.renderer.continues(messages, arguments):
            return None
        asked = self.renderer.question(messages)
        before = self.renderer(asked, where, rollout.arguments, count=False)

        def whole(reply: dict) -> str:
            return self.renderer.render([*asked, reply], where, arguments)

        kept = {key: value for key, value in message.items() if key not in parts}
        full, without = whole(message), whole({"content": ""} | kept)
        if full == without or not full.startswith(before):
            return None
        closing = whole({"role": "assistant", "content": PROBE}).rpartition(PROBE)[2]
        return full.removeprefix(before).removesuffix(closing)

    def _with_prompt(self, rollout: Rollout, where: str) -> Rollout:
        """Replace the prompt by its rendered text. A prompt that lost its special tokens is looked
        up among the known prompts.
        """
        if missing(rollout.prompt) or rollout.prompt_ids is not None:
            text = rollout.prompt if isinstance(rollout.prompt, str) else None
            return replace(rollout, prompt=text)
        original = (
            self.stripped.get(rollout.prompt.strip())
            if rollout.rendered and isinstance(rollout.prompt, str)
            else None
        )
        if original is not None:
            self.counts["restored"] += 1
            return replace(
                rollout,
                prompt=original.prompt,
                prompt_id=rollout.prompt_id or original.prompt_id,
                domain=rollout.domain or original.domain,
                teacher_prompt=rollout.teacher_prompt or original.teacher_prompt,
            )
        text = self._rendered(rollout.prompt, rollout, where)
        self.counts["without_special"] += self.writes_special and not self.renderer.has_special(
            text
        )
        return replace(rollout, prompt=text)

    def _rendered(self, value: Any, rollout: Rollout, where: str, *, count: bool = True) -> str:
        """Return the rendered text of a prompt, of the student or the teacher."""
        value = parse_messages(value, where)
        if isinstance(value, str) and rollout.rendered:
            return value
        return self.renderer(value, where, rollout.arguments, count=count)

    def _with_teacher_ids(self, rollout: Rollout, where: str) -> Rollout:
        """Add the teacher's own prompt as text and ids, where the row has one."""
        if rollout.teacher_prompt_ids is None and not missing(rollout.teacher_prompt):
            value = parse_messages(rollout.teacher_prompt, where)
            whole = isinstance(value, str) and rollout.rendered
            text = (
                value
                if isinstance(value, str) and whole
                else self.teacher_renderer(value, where, rollout.arguments, count=False)
            )
            ids = encode_prompt(
                self.teacher_tokenizer, text, rendered=text in self.teacher_renderer.written
            )
            return replace(rollout, teacher_prompt=text, teacher_prompt_ids=ids)
        return rollout

    # Text becomes ids, and the response is cut out of them.

    def _cannot_fit(self, rollout: Rollout) -> bool:
        """Whether a text is so much longer than the window that it need not be tokenized
        completely.
        """
        texts = [
            rollout.prompt if rollout.prompt_ids is None else None,
            rollout.response if rollout.response_ids is None else None,
        ]
        return self.window is not None and any(
            text is not None and is_far_longer(text, self.window, self.tokenizer) for text in texts
        )

    def _ids(self, rollout: Rollout) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ids of prompt and response, encoding them together where they are text."""
        prompt_ids = (
            rollout.prompt_ids
            if rollout.prompt_ids is not None
            else self._encode_prompt(rollout.prompt)
        )
        if rollout.response_ids is not None:
            return prompt_ids, rollout.response_ids
        assert rollout.response is not None  # read_row refuses a row that has neither
        self.counts["from_text"] += 1
        before = rollout.prompt if rollout.prompt_ids is None else self._text(prompt_ids)
        whole = rollout.prompt_ids is not None or self._is_written(rollout.prompt)
        encode = self._encode if whole else self._encode_prompt
        together = encode(before + rollout.response)
        if together[: len(prompt_ids)] == prompt_ids:
            return prompt_ids, together[len(prompt_ids) :]
        self.counts["joined"] += 1
        return prompt_ids, self._encode(rollout.response)

    def _students_part(
        self, response_ids: tuple[int, ...], own: tuple[bool, ...] | None
    ) -> tuple[tuple[int, ...], tuple[bool, ...] | None]:
        """Return the response up to the last token that the student wrote, and its mask where
        others stand between; with the first turn alone, up to the first that it did not write.

        Padding does not belong to it, whatever the mask says.
        """
        if own is None or all(own):
            return response_ids, None
        start = 0
        while start < len(own) and not own[start] and response_ids[start] in self.fillers:
            start += 1
        if self.turns == "first":
            end = start + (*own[start:], False).index(False)
        else:
            end = len(own) - own[::-1].index(True) if any(own) else start
        beyond = response_ids[:start] + response_ids[end:]
        foreign = any(i not in self.fillers for i in beyond)
        self.counts["cut"] += foreign
        self.counts["padded"] += bool(beyond) and not foreign
        kept = own[start:end]
        return response_ids[start:end], None if all(kept) else kept

    def _without_padding(
        self,
        prompt_ids: tuple[int, ...],
        response_ids: tuple[int, ...],
        teacher_ids: tuple[int, ...] | None,
        *,
        whole: bool = False,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...] | None]:
        """Return prompt, response and teacher's prompt: both prompts without padding, the response
        up to its first end token, or (`whole`) as it is: one of several turns ends several times.
        """
        bare = self._unpadded(prompt_ids)
        bare_teacher = teacher_ids and self._unpadded(teacher_ids)
        first = 0 if whole else self._leading_padding(response_ids)
        kept, beyond = (response_ids, ()) if whole else self._split_at_end(response_ids[first:])
        foreign = any(i not in self.fillers for i in beyond)
        self.counts["after_end"] += foreign
        self.counts["padded"] += (
            (bare, bare_teacher) != (prompt_ids, teacher_ids)
            or first > 0
            or (bool(beyond) and not foreign)
        )
        return bare, kept, bare_teacher

    def _leading_padding(self, response_ids: tuple[int, ...]) -> int:
        """Return the number of padding tokens before a response.

        Where the padding token also ends responses, it is an empty response's end instead.
        """
        if not response_ids or response_ids[0] != self.pad or self.pad in self.end_ids:
            return 0
        return self._leading_repeats(response_ids)

    def _split_at_end(self, ids: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return a response up to its first end token, else without final padding, and the rest."""
        end = next((place for place, i in enumerate(ids) if i in self.end_ids), None)
        if end is not None:
            return ids[: end + 1], ids[end + 1 :]
        padding = self._leading_repeats(ids[::-1]) if ids and ids[-1] == self.pad else 0
        return ids[: len(ids) - padding], ids[len(ids) - padding :]

    def _unpadded(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Remove padding from both ends of a prompt. One end token, or one start token, may belong
        to the prompt; the padding token does not.
        """
        for _ in range(2):  # once per end: the ids are reversed in between
            run = self._leading_repeats(ids)
            own = ids[:1] == (getattr(self.tokenizer, "bos_token_id", None),) or (
                run == 1 and ids[0] in self.end_ids
            )
            ids = ids[run - own :] if run and run < len(ids) and ids[0] in self.fillers else ids
            ids = ids[::-1]
        return ids

    def _leading_repeats(self, ids: tuple[int, ...]) -> int:
        """Return how often the first id is repeated at the beginning."""
        return next((place for place, i in enumerate(ids) if i != ids[0]), len(ids))

    def _usable(self, prompt_ids: tuple[int, ...], response_ids: tuple[int, ...]) -> bool:
        """Whether there is a response and it fits into the window with its prompt."""
        over_long = self.window is not None and len(prompt_ids) + len(response_ids) > self.window
        self.counts["empty"] += not response_ids
        self.counts["over_long"] += over_long and bool(response_ids)
        return bool(response_ids) and not over_long

    def _count_faults(
        self,
        rollout: Rollout,
        prompt_ids: tuple[int, ...],
        response_ids: tuple[int, ...],
        given_ids: tuple[int, ...],
    ) -> None:
        """Count drift, other text and repetitions. given_ids: the response before it was cut, which
        is what the file's text spells.
        """
        ids = prompt_ids + response_ids
        self.counts["retokenised"] += self._encode(self._text(ids)) != ids
        self.counts["repeated"] += (prompt_ids, response_ids) in self.seen
        self.seen.add((prompt_ids, response_ids))
        if rollout.response is not None and (rollout.own is None or all(rollout.own)):
            spelled = any(
                self._spells(prompt_ids, found, rollout.response)
                for found in {response_ids, given_ids}
            )
            self.counts["other_text"] += not spelled
            if rollout.response_ids is not None:
                self.counts["spelled"] += 1
                self.counts["other_spelling"] += not spelled

    def _spells(
        self, prompt_ids: tuple[int, ...], response_ids: tuple[int, ...], response: str
    ) -> bool:
        """Whether the ids decode to the text, with special tokens written or left out."""
        whole = self._text(prompt_ids + response_ids)
        forms = (
            whole[len(self._text(prompt_ids)) :],
            self._text(response_ids),
            self.tokenizer.decode(response_ids, skip_special_tokens=True),
        )
        return any(form.strip() == response.strip() for form in forms)

    def _context(
        self,
        rollout: Rollout,
        prompt_ids: tuple[int, ...],
        response_ids: tuple[int, ...],
        own: tuple[bool, ...] | None,
    ) -> Context:
        """Build the context of a row."""
        prompt = rollout.prompt if isinstance(rollout.prompt, str) else self._text(prompt_ids)
        return Context(
            context_id=rollout.context_id or "",
            prompt_id=rollout.prompt_id or rollout.context_id or digest(prompt),
            prompt=prompt,
            prompt_ids=prompt_ids,
            response=self._own_text(response_ids, own),
            response_ids=response_ids,
            finished=response_ids[-1] in self.end_ids,
            teacher_prompt=rollout.teacher_prompt if rollout.teacher_prompt_ids else None,
            teacher_prompt_ids=rollout.teacher_prompt_ids,
            supervised=own,
            domain=rollout.domain,
        )

    def _own_text(self, response_ids: tuple[int, ...], own: tuple[bool, ...] | None) -> str:
        """What the student wrote, as a verifier reads it: one line per turn where others stand
        between.
        """
        turns = groupby(zip(response_ids, own or repeat(True)), key=lambda pair: pair[1])
        return "\n".join(
            self.tokenizer.decode([i for i, _ in turn], skip_special_tokens=True)
            for mine, turn in turns
            if mine
        )

    def _logprobs(
        self, rollout: Rollout, given_ids: tuple[int, ...], response_ids: tuple[int, ...]
    ) -> tuple[float, ...] | None:
        """The sampling engine's log-probabilities of the response that was kept; counted."""
        if rollout.logprobs is None:
            return None
        values = sampled_logprobs.read(rollout.logprobs, given_ids)
        found = values and sampled_logprobs.of_kept(values, given_ids, response_ids, rollout.own)
        self.counts["logprobs" if found else "logprobs_unplaced"] += 1
        return found or None

    def _encode_prompt(self, text: str) -> tuple[int, ...]:
        return encode_prompt(self.tokenizer, text, rendered=self._is_written(text))

    def _is_written(self, text: str) -> bool:
        """Whether the chat template wrote the text, here or when the prompts were read."""
        return text in self.renderer.written

    def _encode(self, text: str) -> tuple[int, ...]:
        require_unicode(text)
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _text(self, ids: tuple[int, ...]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def _stripped(self, text: str) -> str:
        """Return the text of a prompt as a dump without special tokens would hold it."""
        return self.tokenizer.decode(
            encode_prompt(self.tokenizer, text), skip_special_tokens=True
        ).strip()


def number_contexts(contexts: list[Context], path: Path) -> Iterator[Context]:
    """Yield the contexts, numbering those without an id within their prompt. Raises
    DiagnosticsError where two have the same id.
    """
    samples: Counter[str] = Counter()
    taken: set[str] = set()
    for context in contexts:
        name = context.context_id or f"{context.prompt_id}-{samples[context.prompt_id]}"
        samples[context.prompt_id] += not context.context_id
        if name in taken:
            raise DiagnosticsError(
                f"{path}: two contexts are named {name!r}. Give every row its own id, or none."
            )
        taken.add(name)
        yield replace(context, context_id=name)
