//! YAML as a tree whose every node knows its place, so that a mistake can be named where it stands.
//!
//! An alias is the node that it names, not a copy of it, and a merge key is resolved where its map ends, against a limit: no text
//! grows beyond what it holds by naming itself often. Pure.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::rc::Rc;

use saphyr_parser::{Event, Marker, Parser, ScalarStyle, ScanError, Span};

/// The longest text that is read.
pub const MAX_BYTES: usize = 1 << 20;
/// How deep lists and maps may lie in each other.
const MAX_DEPTH: usize = 64;
/// How many entries all merge keys of a text may bring into maps.
const MAX_MERGED: usize = 100_000;

/// A place in a text, both counted from one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub line: usize,
    pub column: usize,
}

impl From<&Marker> for Place {
    fn from(marker: &Marker) -> Place {
        Place {
            line: marker.line(),
            column: marker.col() + 1,
        }
    }
}

/// What is wrong with a text, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    pub place: Place,
    pub what: String,
}

impl Fault {
    pub fn new(place: Place, what: impl Into<String>) -> Fault {
        Fault {
            place,
            what: what.into(),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(
            f,
            "{}:{}: {}",
            self.place.line, self.place.column, self.what
        )
    }
}

/// A scalar, a list or a map, and where it begins.
#[derive(Debug)]
pub struct Node {
    pub place: Place,
    pub kind: Kind,
}

#[derive(Debug)]
pub enum Kind {
    /// `plain`: without quotes, so that it may mean something else than its text.
    Text {
        text: String,
        plain: bool,
    },
    List(Vec<Rc<Node>>),
    Map(Vec<Entry>),
}

/// An entry of a map.
#[derive(Clone, Debug)]
pub struct Entry {
    pub key: String,
    pub place: Place,
    pub value: Rc<Node>,
}

impl Node {
    pub fn fault(&self, what: impl Into<String>) -> Fault {
        Fault::new(self.place, what)
    }

    /// What it is, for a message.
    pub fn is_a(&self) -> &'static str {
        match &self.kind {
            _ if self.is_null() => "nothing",
            _ if self.as_bool().is_some() => "true or false",
            _ if self.is_number() => "a number",
            Kind::Text { .. } => "a text",
            Kind::List(_) => "a list",
            Kind::Map(_) => "a map",
        }
    }

    fn plain(&self) -> Option<&str> {
        match &self.kind {
            Kind::Text { text, plain: true } => Some(text),
            _ => None,
        }
    }

    pub fn is_null(&self) -> bool {
        self.plain()
            .is_some_and(|text| matches!(text, "" | "~" | "null" | "Null" | "NULL"))
    }

    /// The truth that a plain word means, by YAML 1.1 as well as 1.2.
    pub fn as_bool(&self) -> Option<bool> {
        match self.plain()?.to_ascii_lowercase().as_str() {
            "true" | "yes" | "on" => Some(true),
            "false" | "no" | "off" => Some(false),
            _ => None,
        }
    }

    /// Whether it is a plain word that YAML's core schema takes for a number.
    fn is_number(&self) -> bool {
        self.plain().is_some_and(is_number)
    }

    /// Its text, if it is one and means nothing else.
    pub fn text(&self) -> Option<&str> {
        self.word().filter(|_| !self.is_number())
    }

    /// Its text, if it is one or a number.
    pub fn word(&self) -> Option<&str> {
        self.scalar().filter(|_| self.as_bool().is_none())
    }

    /// Its text as it was written, if it is a scalar.
    pub fn scalar(&self) -> Option<&str> {
        match &self.kind {
            Kind::Text { text, .. } if !self.is_null() => Some(text),
            _ => None,
        }
    }

    /// Its entries, if it is a map.
    pub fn entries(&self) -> Option<&[Entry]> {
        match &self.kind {
            Kind::Map(entries) => Some(entries),
            _ => None,
        }
    }

    /// What a map has under a key; nothing if it is no map.
    pub fn get(&self, key: &str) -> Option<&Rc<Node>> {
        let entries = self.entries()?;
        entries.iter().find(|e| e.key == key).map(|e| &e.value)
    }
}

/// An integer or a float of YAML's core schema.
fn is_number(text: &str) -> bool {
    let all = |text: &str, of: fn(&u8) -> bool| !text.is_empty() && text.bytes().all(|b| of(&b));
    if let Some(digits) = text.strip_prefix("0x") {
        return all(digits, u8::is_ascii_hexdigit);
    }
    if let Some(digits) = text.strip_prefix("0o") {
        return all(digits, |b| matches!(b, b'0'..=b'7'));
    }
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
    if matches!(unsigned, ".inf" | ".Inf" | ".INF") || matches!(text, ".nan" | ".NaN" | ".NAN") {
        return true;
    }
    let (mantissa, exponent) = match unsigned.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, Some(exponent)),
        None => (unsigned, None),
    };
    let exponent = exponent.map(|e| e.strip_prefix(['-', '+']).unwrap_or(e));
    let (whole, part) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    // A point needs a digit on one of its sides.
    !(whole.is_empty() && part.is_empty())
        && digits(whole)
        && digits(part)
        && exponent.is_none_or(|e| all(e, u8::is_ascii_digit))
}

/// Reads a text that holds one document; an empty one is an empty map.
///
/// # Errors
/// What is no YAML, is too large, or has a key twice.
pub fn parse(text: &str) -> Result<Rc<Node>, Fault> {
    if text.len() > MAX_BYTES {
        let place = Place { line: 1, column: 1 };
        let what = format!("it has more than {} KiB", MAX_BYTES >> 10);
        return Err(Fault::new(place, what));
    }
    let mut builder = Builder::default();
    for event in Parser::new_from_str(text) {
        let (event, span) = event.map_err(|error: ScanError| {
            let what = error.info().replace(['\n', '\r'], " ");
            Fault::new(error.marker().into(), what)
        })?;
        builder.take(event, span)?;
    }
    Ok(builder.root.unwrap_or_else(|| {
        Rc::new(Node {
            place: Place { line: 1, column: 1 },
            kind: Kind::Map(Vec::new()),
        })
    }))
}

/// A list or a map that has not ended yet.
struct Open {
    anchor: usize,
    place: Place,
    items: Items,
}

enum Items {
    List(Vec<Rc<Node>>),
    Map {
        entries: Vec<Entry>,
        merges: Vec<Rc<Node>>,
        key: Option<Rc<Node>>,
    },
}

#[derive(Default)]
struct Builder {
    open: Vec<Open>,
    anchors: HashMap<usize, Rc<Node>>,
    merged: usize,
    root: Option<Rc<Node>>,
}

impl Builder {
    fn take(&mut self, event: Event, span: Span) -> Result<(), Fault> {
        let place = Place::from(&span.start);
        match event {
            Event::Scalar(text, style, anchor, tag) => {
                let plain = match &tag {
                    None => style == ScalarStyle::Plain,
                    // What is said to be something else than a text is none, with quotes too.
                    Some(tag) => tag.is_yaml_core_schema() && tag.suffix != "str",
                };
                let text = text.into_owned();
                let kind = Kind::Text { text, plain };
                self.done(anchor, Node { place, kind })
            }
            Event::Alias(anchor) => {
                let named = self.anchors.get(&anchor).cloned();
                let node = named.ok_or_else(|| {
                    Fault::new(place, "this alias names something that it is a part of")
                })?;
                self.put(node)
            }
            Event::SequenceStart(anchor, _) => self.begin(anchor, place, Items::List(Vec::new())),
            Event::MappingStart(anchor, _) => {
                let items = Items::Map {
                    entries: Vec::new(),
                    merges: Vec::new(),
                    key: None,
                };
                self.begin(anchor, place, items)
            }
            Event::SequenceEnd | Event::MappingEnd => self.end(),
            Event::DocumentStart(_) if self.root.is_some() => {
                Err(Fault::new(place, "a second document begins here"))
            }
            _ => Ok(()),
        }
    }

    fn begin(&mut self, anchor: usize, place: Place, items: Items) -> Result<(), Fault> {
        if self.open.len() == MAX_DEPTH {
            return Err(Fault::new(place, "lists and maps lie too deep here"));
        }
        self.open.push(Open {
            anchor,
            place,
            items,
        });
        Ok(())
    }

    fn end(&mut self) -> Result<(), Fault> {
        let Some(open) = self.open.pop() else {
            return Ok(());
        };
        let kind = match open.items {
            Items::List(items) => Kind::List(items),
            Items::Map {
                entries, merges, ..
            } => Kind::Map(self.merge(entries, &merges)?),
        };
        let place = open.place;
        self.done(open.anchor, Node { place, kind })
    }

    /// What a map says itself goes before what it merges, and that goes by order.
    fn merge(&mut self, mut entries: Vec<Entry>, merges: &[Rc<Node>]) -> Result<Vec<Entry>, Fault> {
        let mut known = HashSet::new();
        for entry in &entries {
            if !known.insert(entry.key.clone()) {
                let what = format!("{:?} is there twice", entry.key);
                return Err(Fault::new(entry.place, what));
            }
        }
        for node in merges {
            let maps = match &node.kind {
                Kind::List(items) => items.as_slice(),
                _ => std::slice::from_ref(node),
            };
            for map in maps {
                let Some(merged) = map.entries() else {
                    let what = format!(
                        "<< takes a map or a list of maps, and this is {}",
                        map.is_a()
                    );
                    return Err(map.fault(what));
                };
                self.merged += merged.len() + 1;
                if self.merged > MAX_MERGED {
                    return Err(node.fault("merge keys bring in too much here"));
                }
                let new = merged.iter().filter(|e| known.insert(e.key.clone()));
                entries.extend(new.cloned());
            }
        }
        Ok(entries)
    }

    fn done(&mut self, anchor: usize, node: Node) -> Result<(), Fault> {
        let node = Rc::new(node);
        if anchor != 0 {
            self.anchors.insert(anchor, node.clone());
        }
        self.put(node)
    }

    fn put(&mut self, node: Rc<Node>) -> Result<(), Fault> {
        match self.open.last_mut().map(|open| &mut open.items) {
            None => self.root = Some(node),
            Some(Items::List(items)) => items.push(node),
            Some(Items::Map {
                entries,
                merges,
                key: waiting,
            }) => match waiting.take() {
                None => *waiting = Some(node),
                Some(key) if key.plain() == Some("<<") => merges.push(node),
                Some(key) => {
                    let Kind::Text { text, .. } = &key.kind else {
                        return Err(
                            key.fault(format!("a key is a text, and this is {}", key.is_a()))
                        );
                    };
                    entries.push(Entry {
                        key: text.clone(),
                        place: key.place,
                        value: node,
                    });
                }
            },
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(node: &Node) -> String {
        match &node.kind {
            Kind::Text { text, .. } => text.clone(),
            Kind::List(items) => {
                let items: Vec<String> = items.iter().map(|i| shown(i)).collect();
                format!("[{}]", items.join(" "))
            }
            Kind::Map(entries) => {
                let one = |e: &Entry| format!("{}={}", e.key, shown(&e.value));
                let entries: Vec<String> = entries.iter().map(one).collect();
                format!("{{{}}}", entries.join(" "))
            }
        }
    }

    fn fault(text: &str) -> String {
        parse(text).unwrap_err().to_string()
    }

    #[test]
    fn nodes_know_their_places() {
        let root = parse("a: 1\nb:\n  - x\n  - {c: \"d\"}\n").unwrap();
        assert_eq!(shown(&root), "{a=1 b=[x {c=d}]}");
        let Kind::List(items) = &root.get("b").unwrap().kind else {
            panic!("{root:?}");
        };
        let place = |line, column| Place { line, column };
        assert_eq!(items[0].place, place(3, 5));
        assert_eq!(items[1].get("c").unwrap().place, place(4, 9));
        assert_eq!(root.entries().unwrap()[1].place, place(2, 1));
        assert_eq!(shown(&parse("").unwrap()), "{}");
    }

    #[test]
    fn a_merge_key_gives_what_the_map_does_not_say_and_the_first_one_wins() {
        for (text, expected) in [
            ("[&x {a: 1, b: 2}, {b: 3, <<: *x}]", "[{a=1 b=2} {b=3 a=1}]"),
            (
                "[&x {a: 1}, &y {a: 2, c: 3}, {<<: [*x, *y]}]",
                "[{a=1} {a=2 c=3} {a=1 c=3}]",
            ),
            (
                "[&x {a: 1}, &y {<<: *x, b: 2}, {<<: *y}]",
                "[{a=1} {b=2 a=1} {b=2 a=1}]",
            ),
            ("[&x {a: 1}, {'<<': *x}]", "[{a=1} {<<={a=1}}]"),
            ("[&x [1], *x, &x 2, *x]", "[[1] [1] 2 2]"),
        ] {
            assert_eq!(shown(&parse(text).unwrap()), expected, "{text}");
        }
    }

    #[test]
    fn what_words_mean_depends_on_quotes() {
        let is = |text: &str| {
            let node = parse(text).unwrap();
            (node.is_null(), node.as_bool(), node.text().is_some())
        };
        assert_eq!(is("~"), (true, None, false));
        assert_eq!(is("'~'"), (false, None, true));
        assert_eq!(is("Off"), (false, Some(false), false));
        assert_eq!(is("\"off\""), (false, None, true));
        assert_eq!(is("!!str off"), (false, None, true));
        assert_eq!(is("yes"), (false, Some(true), false));
        assert_eq!(is("20"), (false, None, false));
        assert_eq!(is("'20'"), (false, None, true));
        assert_eq!(is("!!str 20"), (false, None, true));
        assert_eq!(is("!!int '20'"), (false, None, false));
    }

    #[test]
    fn numbers_are_those_of_the_core_schema() {
        for text in [
            "0", "3", "-3", "+12", "0o17", "0xfF", "1.5", "1.", ".5", "-1e3", "1E-3", "1.5e+3",
            ".inf", "-.INF", ".nan",
        ] {
            assert!(is_number(text), "{text}");
        }
        for text in [
            "", "-", ".", "+.", "e3", "1e", "1e+", "0o8", "0x", "1.2.3", "20g", "1_000", "a1",
            "-.nan", "..", "./3", "0b1", "1:30", "\u{661}",
        ] {
            assert!(!is_number(text), "{text}");
        }
    }

    #[test]
    fn what_names_itself_often_stays_small_or_is_refused() {
        let mut laughs = "a: &a {x: 1}\n".to_owned();
        for n in 0..60 {
            let before = if n == 0 {
                "a".into()
            } else {
                format!("l{}", n - 1)
            };
            laughs.push_str(&format!(
                "l{n}: &l{n} [{}]\n",
                vec![format!("*{before}"); 10].join(", ")
            ));
        }
        assert_eq!(parse(&laughs).unwrap().entries().unwrap().len(), 61);

        let mut merges: String = (0..1000).map(|n| format!("  k{n}: 1\n")).collect();
        merges.insert_str(0, "a: &a\n");
        merges.extend((0..200).map(|n| format!("m{n}: {{<<: *a}}\n")));
        assert!(fault(&merges).contains("merge keys bring in too much"));

        assert!(fault(&"[".repeat(100)).contains("too deep"));
        assert!(fault("a: &a [*a]").starts_with("1:8: this alias names"));
        assert!(fault(&"#".repeat(MAX_BYTES + 1)).contains("more than 1024 KiB"));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place() {
        for (text, start) in [
            ("a: 1\nb: [1\n", "3:1: "),
            ("a: *x\n", "1:4: "),
            ("a: 1\n? [b]\n: 2\n", "2:3: a key is a text"),
            ("a: 1\n<<: 2\n", "2:5: << takes a map"),
            ("a: 1\nb: 2\na: 3\n", "3:1: \"a\" is there twice"),
            ("a: 1\n---\nb: 2\n", "2:1: a second document"),
        ] {
            let fault = fault(text);
            assert!(fault.starts_with(start), "{text:?}: {fault}");
        }
    }
}
