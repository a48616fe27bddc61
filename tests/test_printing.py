from perl_jax.printing import printable


def test_what_could_move_the_cursor_is_escaped():
    assert printable('a\x1b[2Jb\x07 \x9b1m \u202eevil\u202c \ud800') == r'a\x1b[2Jb\x07 \x9b1m \u202eevil\u202c \ud800'


def test_texts_stay():
    for text in 'two\n\tlines', 'é 漢字 👩\u200d🚀', 'می\u200cخواهم', '':
        assert printable(text) == text
