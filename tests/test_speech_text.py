"""What is read aloud of a text, and in which parts: a table of hard cases, and what holds for any text."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Protocol

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from voice import Sentences, Speakable, SpokenParts, speakable

# A bar stands where one part ends and the next begins.
SENTENCES = """
Hello.
Hello. |World.
Hello! |How are you? |Fine.
One.  |Two.   |Three.
What?! |No way!! |Yes.
Really?? |I think so…
Wait... |What happened?
Well… |Maybe.
I was… well, tired. |Then I slept.
So... anyway, it works.
No stop at the end
Dr. Smith is here. |He waits.
Mr. and Mrs. Jones left. |Ms. Lee stayed.
Prof. Müller met St. Peter. |Amen.
See Fig. 3 and Eq. 4. |They differ.
He said vs. she said. |Both lied.
Use a tool, e.g. a hammer. |Or i.e. Thor's.
Smith et al. found it. |Others did not.
It weighs approx. Five tons. |Heavy!
Apples, pears, etc. |They are fruit.
Apples, pears, etc. are fruit. |Yes.
Acme Inc. makes it. |Acme Ltd. |Both do.
Acme Inc. |The best.
He works at Acme Corp. in Oslo. |I don't.
Come at 5 p.m. |The door is open.
Come at 5 p.m. sharp. |Thanks.
At 9 a.m. |Then lunch.
The U.S. Army came. |They saw.
He lives in the U.S. |He likes it.
The U.K. is wet. |So is D.C. |But why?
J. R. R. Tolkien wrote it. |I read it.
George W. Bush spoke. |We listened.
Plan B. |The third way.
Was it you or I? |It was I.
She has a Ph.D. in physics. |He has a B.A. |They teach.
No. 5 is alive. |No. |It is not.
See pp. 12 and vol. 3. |The end.
Jan. 5 was cold. |In Feb. it thawed.
It costs $3.50. |That is cheap.
Pi is 3.14159. |E is 2.71828.
1,000.50 is a number. |So is 1.000,50.
Version 2.0.1 is out. |Get it.
It is 10:30. |Go.
The score was 3. |They won.
It starts in 1984. |Big Brother watches.
I have 5. |5 is enough.
1. First point. |Then more.
2. Second point
12. A dozen. |Eggs.
Visit example.com. |It works.
Visit www.example.com/a.b?c=d. |Then leave.
Mail me at a.b@example.com. |Soon.
Open file.txt and main.py. |Run them.
Node.js and ASP.NET are old. |So is Java.
Use .NET or .env files. |Fine.
Call foo.bar(). |It returns.
"Stop!" he said. |She went.
"Stop!" |He ran.
"I came." |"I saw." |"I won."
He said "Go." |Then he left.
He said “Go.” |Then he left.
‘Why?’ |‘Because.’
(This is one. |And two.) |Then three.
It works (really). |Yes.
It works [sic]. |Yes.
He asked "why?" and left. |Odd.
Yahoo! is a name. |So is Jeopardy!
Who? |What? |When?
What? no. |Yes.
I like C. |It is small.
Ok.Next
line one\\n|line two\\n|line three
Title\\n|\\nText here. |More.
Hello.\\n|World.
- \\n- one\\n|two
... Yes.
?! what
. . . ok. |Fine
Mr.Smith left. |Bye.
I paid 5 €. |It was fair.
50 %. |Not more.
It's 5 o'clock. |Tea!
The end.) |Then.
A.D. 500 came. |Rome fell.
I met Jr. |He is tall.
Mt. Everest is high. |Ft. Knox is not.
Gen. Lee, Col. Mustard and Sgt. Pepper met. |Capt. Hook watched.
Say it! |(Loudly.) |Again!
Hmm. |Ah. |Oh.
Don't. |Won't. |Can't.
Rock 'n' roll. |It lives.
The dept. closed. |Rev. Green left.
To be continued.... |Soon.
Mix of stops?!?! |Yes!!!
Am 3. Mai war es kalt. |Dann kam der Juni.
Am 24. Dezember ist Heiligabend. |Wir feiern.
Das 19. Jahrhundert war lang. |Ja.
Das ist z.B. ein Hund. |Oder z. B. eine Katze.
Er kam d.h. er ging. |Gut.
Hunde, Katzen usw. |Alle kamen.
Hunde, Katzen usw. waren da. |Gut.
Dr. Weiß und Hr. Schwarz kamen. |Frau Rot nicht.
Siehe Abs. 3 und Nr. 7. |Danke.
Das kostet ca. 5 Euro. |Oder bzw. Sechs.
„Komm!“, rief er. |Sie kam.
„Komm!“ |Sie kam.
»Ja.« |«Nein.»
M. Dupont et Mme. Durand sont là. |Ils parlent.
C’est bon ! |Vraiment ? |Oui.
« Bonjour. » |Il part.
Il est 5 h. |Il dort.
P.ex. un chat. |Ou un chien.
¿Qué tal? |¡Muy bien! |Gracias.
El Sr. López y la Sra. Díaz. |Viven aquí.
La pág. 5 es buena. |Sí.
EE.UU. es grande. |Sí.
Il Sig. Rossi dorme. |Il Dott. Bianchi no.
Pane, vino, ecc. |Tutto buono.
O Exmo. Ministro falou. |Bem.
Dat is bijv. een kat. |Of d.w.z. Een hond.
Это т.е. кот. |Он спит.
И т.д. |Она ушла.
А. С. Пушкин писал. |Мы читаем.
Ул. Ленина длинная. |Да.
你好。|我很好。|谢谢！
你好吗？|我很好！
他说：「好。」|然后走了。
「真的吗？」|他问。
“走吧。”|他说。
价格是3.14元。|很便宜。
好吗?|好!
你好。 |再见。
こんにちは。|元気ですか？|はい！
「はい。」|と言った。
すごい！！|本当？！|うん。
안녕하세요. |잘 지내세요? |네.
नमस्ते। |आप कैसे हैं? |मैं ठीक हूँ।
डॉ. शर्मा आए। |वे बैठे॥ |फिर गए।
यह 3.14 है। |ठीक।
مرحبا. |كيف حالك؟ |بخير.
یہ اچھا ہے۔ |شکریہ۔
שלום. |מה שלומך? |טוב.
Բարև։ |Ինչպես եք։
สวัสดีครับ ผมชื่อสมชาย
ሰላም። |እንዴት ነህ።
မင်္ဂလာပါ။ |နေကောင်းလား။
Καλημέρα. |Τι κάνεις;
Mixed 中文。|English. |日本語。|End.
""".strip().split("\n")


class Feeder(Protocol):
    def feed(self, text: str) -> list[str]: ...
    def close(self) -> list[str]: ...


def fed(feeder: Feeder, pieces: list[str]) -> list[str]:
    return [part for piece in pieces for part in feeder.feed(piece)] + feeder.close()


def patient() -> Sentences:
    """Without the haste at the beginning, and with room for any sentence."""
    return Sentences(clause=10_000, first=10_000, longest=10_000)


@pytest.mark.parametrize("case", SENTENCES)
def test_sentences(case: str) -> None:
    """Sentences end where a reader pauses, whether the text comes at once or by the character."""
    parts = case.replace("\\n", "\n").split("|")
    text = "".join(parts)
    assert fed(patient(), [text]) == parts
    assert fed(patient(), list(text)) == parts


TEXT = st.text(
    st.sampled_from("aB1é漢ひ한नمॎ .,;:!?…。！？।—\"'”(）)[]\n\t\u200d\u0301 \u00a0") | st.characters(), max_size=400
)
CUTS = st.lists(st.integers(1, 30), max_size=60)


def cut(text: str, sizes: list[int]) -> list[str]:
    pieces = []
    for size in sizes:
        pieces.append(text[:size])
        text = text[size:]
    return [*pieces, text]


@given(TEXT, CUTS, st.sampled_from([(24, 90, 300), (5, 20, 30), (1, 2, 3)]))
@settings(max_examples=150, deadline=None)
def test_sentences_lose_nothing(text: str, sizes: list[int], limits: tuple[int, int, int]) -> None:
    """The parts joined are the text, within the limits, and the same however the text is cut."""
    clause, first, longest = limits

    def splitter() -> Sentences:
        return Sentences(clause=clause, first=first, longest=longest)

    parts = fed(splitter(), [text])
    assert "".join(parts) == text
    assert fed(splitter(), cut(text, sizes)) == parts
    assert fed(splitter(), list(text)) == parts
    assert all(parts)
    room = 60  # a stop within the limit, with what closes and follows it
    assert all(len(part) <= longest + room + len(re.findall(r"[^\w\s]", part)) for part in parts[1:])


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("Of course, I can help you with that, and then some more of it.", "Of course, I can help you with that, "),
        ("Yes, of course.", "Yes, of course."),
        ("Short. And then a long one, which goes on.", "Short. "),
        ("I walked along the river; it was cold and dark there.", "I walked along the river; "),
        ("当然可以帮你做这件事情，然后还有别的事情要做。", "当然可以帮你做这件事情，"),
        (
            "This is a long sentence without any comma that goes on and on until nobody remembers how it began at all",
            "This is a long sentence without any comma that goes on and on until nobody remembers how ",
        ),
        ("x" * 200, "x" * 90),
        ("बहुत " * 40, "बहुत " * 18),
    ],
)
def test_speech_begins_early(text: str, first: str) -> None:
    """The first part may be a clause, or as much as fits; the next is not cut short."""
    parts = fed(Sentences(), [text])
    assert parts[0] == first
    assert "".join(parts) == text


def test_a_sentence_is_out_with_the_next_character() -> None:
    """A part is given out as soon as the first character of the next is there, and a line at its end."""
    sentences = Sentences()
    assert sentences.feed("It is done. ") == []
    assert sentences.feed("N") == ["It is done. "]
    assert sentences.feed("ow\n") == ["Now\n"]
    assert sentences.feed("好。") == []
    assert sentences.feed("再") == ["好。"]


# == What is read aloud ================================================================================================

SPEAKABLE: list[tuple[str, str]] = [
    ("plain text", "plain text"),
    ("  led and trailed  ", "led and trailed"),
    ("two  spaces\t tab", "two spaces tab"),
    ("a\n\n\nb", "a\nb"),
    ("**bold**", "bold"),
    ("*a* and __b__ and _i_", "a and b and i"),
    ("***both***, ~~gone~~", "both, gone"),
    ("**bold**text", "boldtext"),
    ("snake_case_name", "snake_case_name"),
    ("__init__ and _private", "init and private"),
    ("5*3 = 15", "5*3 = 15"),
    ("2 * 3 * 4", "2 * 3 * 4"),
    ("~5 minutes", "~5 minutes"),
    ("\\*not bold\\*", "*not bold*"),
    ("a\\\nb", "a\nb"),
    ("# Title", "Title"),
    ("###### Deep\nText", "Deep\nText"),
    ("####### seven", "####### seven"),
    ("#1 and #hashtag", "#1 and #hashtag"),
    ("Title\n=====\nText", "Title\nText"),
    ("a\n\n---\n\nb", "a\nb"),
    ("***\nb", "b"),
    ("- one\n- two", "one\ntwo"),
    ("* one\n+ two\n  - three", "one\ntwo\nthree"),
    ("- [ ] open\n- [x] done", "open\ndone"),
    ("1. one\n2. two", "1. one\n2. two"),
    ("-5 degrees", "-5 degrees"),
    ("- -5 degrees", "-5 degrees"),
    ("a - b", "a - b"),
    ("> quoted\n> more", "quoted\nmore"),
    ("> > deep\n> - item", "deep\nitem"),
    ("`code` here", "code here"),
    ("``a`b`` c", "ab c"),
    ("Run:\n```sh\nrm -rf /\n```\nDone.", "Run:\nDone."),
    ("```\nx = 1\n", ""),
    ("~~~\ncode\n~~~\nafter", "after"),
    ("````\n```\ninner\n```\n````\nafter", "after"),
    ("```py\na\n```js\nb\n```\nafter", "after"),
    ("- item\n  ```\n  code\n  ```\n- next", "item\nnext"),
    ("```code``` in line", "code in line"),
    ("x ```three``` y", "x three y"),
    ("[text](https://x.y)", "text"),
    ("[the *text*](https://x.y 'title') goes on", "the text goes on"),
    ("[a](b(c)d) e", "a e"),
    ("[a][ref] b", "a b"),
    ("[ref]: https://x.y 'z'\ntext", "text"),
    ("![alt text](a.png)", "alt text"),
    ("[![badge](b.svg)](https://x.y) ok", "badge ok"),
    ("[https://x.y](https://x.y) ok", "ok"),
    ("[not a link] text", "not a link text"),
    ("array[0] (see)", "array (see)"),
    ("[Note] read", "Note read"),
    ("a [b](c", "a b(c"),
    ("fact[^1] and[2] source【4:0†file】.", "fact and source."),
    ("[^1]: the note\ntext", "text"),
    ("wow! [x](y)!", "wow! x!"),
    ("See https://example.com/a?b=c#d.", "See."),
    ("See https://example.com, please.", "See, please."),
    ("HTTPS://EXAMPLE.COM works", "works"),
    ("Go to www.example.com now", "Go to now"),
    ("Go to www or http now", "Go to www or http now"),
    ("https is safe: https://a.b!", "https is safe:!"),
    ("(https://x.y)", ""),
    ("Text (https://x.y) more", "Text more"),
    ("Text (see https://x.y) more", "Text (see) more"),
    ("https://en.wikipedia.org/wiki/A_(b) is it", "is it"),
    ("<https://x.y> and <a@b.c>", "and"),
    ("mailto:a@b.c or a@b.c", "or a@b.c"),
    ("**https://x.y**", ""),
    ("见https://x.y。然后", "见。然后"),
    ("ftp://x.y/z end", "end"),
    ("xhttp://kept", "xhttp://kept"),
    ("Hi 😀!", "Hi!"),
    ("😀", ""),
    ("👨‍👩‍👧‍👦 family", "family"),
    ("👍🏽 ok ❤️ love 🇩🇪 flag", "ok love flag"),
    ("a😀b", "a b"),
    ("1️⃣ first", "1 first"),
    ("☀️ sun ✅ done", "sun done"),
    ("C’est ça ? ©2024 ™", "C’est ça ? ©2024 ™"),
    ("क्‍ष stays", "क्‍ष stays"),
    ("| a | b |\n|---|---|\n| 1 | 2 |\nafter", "after"),
    ("text\n\n| a |\n|---|\n", "text"),
    ("a | b", "a b"),
    ("a<br>b", "a\nb"),
    ("<b>bold</b> <i class='x'>it</i>", "bold it"),
    ("<p>one</p><p>two</p>", "one\ntwo"),
    ("<!-- secret --> seen", "seen"),
    ("a < b and c > d", "a < b and c > d"),
    ("if a<b and c>d", "if a<b and c>d"),
    ("I <3 you", "I <3 you"),
    ("AT&T &amp; R&D &lt;3 &nbsp;x &#65;", "AT&T & R&D <3 x A"),
    ("Tom & Jerry", "Tom & Jerry"),
    ("$5 and 50% off", "$5 and 50% off"),
    ("a\x00b\u200bc\ufeffd", "abcd"),
    ("你好，**世界**！", "你好，世界！"),
]


@pytest.mark.parametrize(("text", "spoken"), SPEAKABLE)
def test_speakable(text: str, spoken: str) -> None:
    """Marks are not read aloud, words are; the same if the text comes by the character."""
    assert speakable(text) == spoken
    reader = Speakable()
    assert "".join(map(reader.feed, text)) + reader.close() == spoken


MARKS = (
    "a b1 word . , ! ? \n \n\n * ** _ __ ~~ ` ``` ~~~ # ## > - + [ ] ( ) ](u) ![ [x] [1] [^a] [a]: <b> </b> <br> < > "
    "& &amp; &lt; | --- === \\ 1. 😀 ❤️ \u200d https://x.y/z http www. mailto: 【 † 】 漢 。 é ' \" : / = % $ $ \t"
)
SNIPPETS = st.lists(st.sampled_from([*MARKS.split(" "), " ", "  "]) | st.text(max_size=5), max_size=40).map("".join)


@given(SNIPPETS, CUTS)
@example("[1](", [])
@settings(max_examples=200, deadline=None)
def test_speakable_does_not_depend_on_cuts(text: str, sizes: list[int]) -> None:
    """However the text is cut, the same is read aloud; no emoji, no fence and no white space too many."""
    whole = speakable(text)
    for pieces in (cut(text, sizes), list(text)):
        reader = Speakable()
        assert "".join(map(reader.feed, pieces)) + reader.close() == whole
    assert whole == whole.strip()
    assert not re.search(r"[ \t]{2}|\n\n|[\U0001f000-\U0001faff\ufe0f\u2600-\u27bf]", whole)


@given(st.lists(st.text(st.sampled_from("abcXYZ019éß漢字नम,.!?;:'"), min_size=1), min_size=1).map(" ".join))
def test_plain_text_is_read_as_it_is(text: str) -> None:
    """Words and punctuation alone pass unchanged."""
    assert speakable("x" + text) == "x" + text


@given(SNIPPETS, CUTS)
@settings(max_examples=100, deadline=None)
def test_parts_are_the_speakable_text(text: str, sizes: list[int]) -> None:
    """The parts to speak, joined, are what `speakable` leaves, but for punctuation alone at the end."""
    parts = fed(SpokenParts(), cut(text, sizes))
    joined, whole = "".join(parts), speakable(text)
    assert whole.startswith(joined)
    assert not any(map(str.isalnum, whole[len(joined) :]))


def test_text_is_not_held_back() -> None:
    """What nothing can change any more is out at once; a bracket does not wait for its partner."""
    reader = Speakable()
    assert reader.feed("Hello") == "Hello"
    assert reader.feed(" *wor") == " wor"
    assert reader.feed("ld* [and a very long link text") == "ld and a very long link text"
    assert reader.feed("](https://x.y) h") == ""
    assert reader.feed("i") == " hi"


@pytest.mark.parametrize(
    "text",
    [
        "*" * 40_000,
        "[" * 40_000,
        "](" * 20_000,
        "a" * 40_000,
        "<a " * 12_000,
        "- " * 20_000,
        "```\n" * 10_000,
        "| \n" * 12_000,
    ],
    ids=lambda text: text[:4].strip(),
)
@pytest.mark.parametrize("make", [SpokenParts, Sentences], ids=["filter", "sentences"])
def test_long_nonsense_takes_no_longer_than_it_must(text: str, make: Callable[[], Feeder]) -> None:
    """Text that holds nothing but marks is read in one pass, in pieces as a model sends them."""
    fed(make(), [text[at : at + 7] for at in range(0, len(text), 7)])
