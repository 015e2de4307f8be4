//! What tests do to valid bytes before a parser sees them.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

/// One harm.
#[derive(Clone, Debug)]
enum Harm {
    Flip(Index, u8),
    Cut(Index),
    Remove(Index, Index),
    /// A piece once more, somewhere else.
    Repeat(Index, Index, Index),
    /// Foreign bytes.
    Insert(Index, Vec<u8>),
    /// The largest of numbers, of as many bytes.
    Huge(Index, usize),
}

fn harm() -> impl Strategy<Value = Harm> {
    let at = any::<Index>;
    prop_oneof![
        4 => (at(), 1_u8..).prop_map(|(at, bits)| Harm::Flip(at, bits)),
        1 => at().prop_map(Harm::Cut),
        1 => (at(), at()).prop_map(|(a, b)| Harm::Remove(a, b)),
        1 => (at(), at(), at()).prop_map(|(a, b, to)| Harm::Repeat(a, b, to)),
        1 => (at(), vec(any::<u8>(), 1..12)).prop_map(|(at, bytes)| Harm::Insert(at, bytes)),
        2 => (at(), 1_usize..10).prop_map(|(at, len)| Harm::Huge(at, len)),
    ]
}

fn place(at: &Index, len: usize) -> usize {
    at.index(len + 1)
}

fn span(a: &Index, b: &Index, len: usize) -> std::ops::Range<usize> {
    let (a, b) = (place(a, len), place(b, len));
    a.min(b)..a.max(b)
}

fn apply(harm: &Harm, bytes: &mut Vec<u8>) {
    let len = bytes.len();
    match harm {
        Harm::Flip(at, bits) => {
            if len > 0 {
                bytes[at.index(len)] ^= bits;
            }
        }
        Harm::Cut(at) => bytes.truncate(place(at, len)),
        Harm::Remove(a, b) => {
            bytes.drain(span(a, b, len));
        }
        Harm::Repeat(a, b, to) => {
            let piece = bytes[span(a, b, len)].to_vec();
            let to = place(to, len);
            bytes.splice(to..to, piece);
        }
        Harm::Insert(at, piece) => {
            let at = place(at, len);
            bytes.splice(at..at, piece.iter().copied());
        }
        Harm::Huge(at, count) => {
            let at = place(at, len);
            for byte in bytes[at..].iter_mut().take(*count) {
                *byte = 0xff;
            }
        }
    }
}

/// Bytes of any kind, and valid ones that were cut, changed, lengthened, or joined to the end of others.
pub fn bytes(valid: impl Strategy<Value = Vec<u8>> + Clone) -> impl Strategy<Value = Vec<u8>> {
    let harmed = (valid.clone(), vec(harm(), 1..4)).prop_map(|(mut bytes, harms)| {
        harms.iter().for_each(|harm| apply(harm, &mut bytes));
        bytes
    });
    let joined = (valid.clone(), valid, any::<Index>(), any::<Index>()).prop_map(
        |(mut head, tail, a, b)| {
            head.truncate(place(&a, head.len()));
            head.extend_from_slice(&tail[place(&b, tail.len())..]);
            head
        },
    );
    prop_oneof![
        1 => vec(any::<u8>(), 0..200),
        6 => harmed,
        1 => joined,
    ]
}

/// The same of a text; what is no UTF-8 any more is replaced.
pub fn text(valid: impl Strategy<Value = String> + Clone) -> impl Strategy<Value = String> {
    bytes(valid.prop_map(String::into_bytes))
        .prop_map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

/// The bytes that hex digits stand for.
pub fn hex(digits: &str) -> Vec<u8> {
    let digits: Vec<u8> = digits.bytes().filter(u8::is_ascii_hexdigit).collect();
    let pairs = digits.chunks(2);
    pairs
        .map(|pair| {
            let pair = str::from_utf8(pair).expect("digits are ASCII");
            u8::from_str_radix(pair, 16).expect("only digits were kept")
        })
        .collect()
}

/// Fails if bytes of the format are not what they were when it was written down.
#[track_caller]
pub fn assert_format(what: &str, bytes: &[u8], digits: &str) {
    let shown: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let wanted: String = hex(digits).iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(
        shown, wanted,
        "{what} has other bytes: raise the format version (docs/format.md)"
    );
}
