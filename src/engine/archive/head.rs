//! The heads of the entries of a tar file: what comes before the content, read within a bound.
//!
//! The library takes lines for PAX records, which a value with a newline breaks, and which may then say anything of the entry; and
//! it reads records of any length into memory. So the bytes of each head are kept, the records are read by their lengths, and what
//! an entry is comes from here alone.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io::{self, Read};

use tar::{Archive, EntryType, Header};

/// The longest head: a path and all extended attributes that an inode can have fit.
const HEAD_MAX: usize = 16 << 20;
const HEAD_TOO_LONG: &str = "what an entry says of itself is longer than 16 MiB";
/// What the records of sparse files are called.
const SPARSE: &str = "GNU.sparse.";
const SPARSE_MAJOR: &str = "GNU.sparse.major";
const SPARSE_MINOR: &str = "GNU.sparse.minor";
const SPARSE_NAME: &str = "GNU.sparse.name";
const SPARSE_SIZE: &str = "GNU.sparse.realsize";
/// The unit of a tar file.
const BLOCK: u64 = 512;

fn wrong(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

/// A tar file as it is read.
pub struct Input<'a> {
    inner: RefCell<&'a mut dyn Read>,
    read: Cell<u64>,
    ended: Cell<bool>,
    /// The bytes of the head that is being read, and where it begins.
    head: RefCell<Option<(u64, Vec<u8>)>>,
}

impl<'a> Input<'a> {
    pub fn new(inner: &'a mut dyn Read) -> Input<'a> {
        Input {
            inner: RefCell::new(inner),
            read: Cell::new(0),
            ended: Cell::new(false),
            head: RefCell::new(None),
        }
    }

    /// Keeps what is read from now on.
    pub fn begin_head(&self) {
        *self.head.borrow_mut() = Some((self.read.get(), Vec::new()));
    }

    /// Returns what was kept, from the first whole block on.
    pub fn take_head(&self) -> Vec<u8> {
        let Some((from, mut bytes)) = self.head.take() else {
            return Vec::new();
        };
        let padding = (from.next_multiple_of(BLOCK) - from) as usize;
        bytes.drain(..padding.min(bytes.len()));
        bytes
    }

    /// Whether more was asked for than there is. A tar file has an end mark, behind which nobody looks.
    pub fn is_cut_off(&self) -> bool {
        self.ended.get()
    }
}

impl Read for &Input<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.borrow_mut().read(buffer)?;
        self.read.set(self.read.get() + count as u64);
        if count == 0 && !buffer.is_empty() {
            self.ended.set(true);
        }
        if let Some((_, head)) = self.head.borrow_mut().as_mut() {
            if head.len() + count > HEAD_MAX {
                return Err(wrong(HEAD_TOO_LONG));
            }
            head.extend_from_slice(&buffer[..count]);
        }
        Ok(count)
    }
}

/// What an entry says of itself.
pub struct Head {
    pub header: Header,
    pub records: Records,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

impl Head {
    /// Reads the bytes of a head.
    pub fn parse(bytes: &[u8]) -> io::Result<Head> {
        let mut archive = Archive::new(bytes);
        let (mut records, mut long_name, mut long_link) = (Records::default(), None, None);
        for entry in archive.entries()?.raw(true) {
            let mut entry = entry?;
            let header = entry.header().clone();
            let extended = header.as_gnu().is_some() || header.as_ustar().is_some();
            let mut content = Vec::new();
            match header.entry_type() {
                EntryType::XHeader if extended => {
                    entry.read_to_end(&mut content)?;
                    records = Records::parse(&content)?;
                }
                EntryType::GNULongName if extended => {
                    entry.read_to_end(&mut content)?;
                    long_name = Some(without_end(content));
                }
                EntryType::GNULongLink if extended => {
                    entry.read_to_end(&mut content)?;
                    long_link = Some(without_end(content));
                }
                _ => {
                    return Ok(Head {
                        header,
                        records,
                        long_name,
                        long_link,
                    });
                }
            }
        }
        Err(wrong("an entry has no header"))
    }

    pub fn path(&self) -> Vec<u8> {
        // A program that knows nothing of holes finds another name in `path`.
        let said = self.records.get(SPARSE_NAME);
        let said = said.or(self.records.get("path")).map(<[u8]>::to_vec);
        said.or_else(|| self.long_name.clone())
            .unwrap_or_else(|| self.header.path_bytes().into_owned())
    }

    /// What a link names.
    pub fn target(&self) -> Option<Vec<u8>> {
        let said = self.records.get("linkpath").map(<[u8]>::to_vec);
        said.or_else(|| self.long_link.clone())
            .or_else(|| self.header.link_name_bytes().map(|name| name.into_owned()))
    }

    /// How long the content is, in the file.
    pub fn size(&self) -> io::Result<u64> {
        match self.records.number("size")? {
            Some(size) => Ok(size),
            None => self.header.entry_size(),
        }
    }

    /// How long a file is whose holes are left out in the PAX form; `None` for any other.
    pub fn sparse_size(&self) -> io::Result<Option<u64>> {
        if self.records.below(SPARSE).next().is_none() {
            return Ok(None);
        }
        let number = |key| self.records.number(key);
        if (number(SPARSE_MAJOR)?, number(SPARSE_MINOR)?) != (Some(1), Some(0)) {
            return Err(wrong("sparse files in an older PAX form cannot be read"));
        }
        let size = number(SPARSE_SIZE)?;
        size.ok_or_else(|| wrong("it does not say its size"))
            .map(Some)
    }

    /// A user or group.
    pub fn id(&self, key: &str, plain: io::Result<u64>) -> io::Result<u32> {
        let id = match self.records.number(key)? {
            Some(id) => id,
            None => plain?,
        };
        // The highest number stands for no change.
        let id = u32::try_from(id).ok().filter(|id| *id != u32::MAX);
        id.ok_or_else(|| wrong(format!("its {key} is out of range")))
    }

    /// When it was changed; `None` if no file can have that time.
    pub fn mtime(&self) -> io::Result<Option<i64>> {
        if let Some(text) = self.records.get("mtime") {
            return Ok(str::from_utf8(text).ok().and_then(parse_time));
        }
        // Times before 1970 are stored as two's complement.
        let seconds = self.header.mtime()? as i64;
        Ok(seconds.checked_mul(1_000_000_000))
    }

    /// The device numbers.
    pub fn device(&self) -> io::Result<(u32, u32)> {
        let missing = || wrong("it has no device numbers");
        let major = self.header.device_major()?.ok_or_else(missing)?;
        let minor = self.header.device_minor()?.ok_or_else(missing)?;
        Ok((major, minor))
    }
}

/// What is said of a sparse file: its own name too, for `path`, in the place of an earlier one, is where a program puts it that
/// cannot read it.
pub fn sparse(path: &[u8], size: u64) -> Vec<(String, Vec<u8>)> {
    let name = path.iter().rposition(|b| *b == b'/').map_or(0, |at| at + 1);
    let (dir, name) = path.split_at(name);
    [
        ("path", [dir, b"GNUSparseFile.0/", name].concat()),
        (SPARSE_MAJOR, b"1".to_vec()),
        (SPARSE_MINOR, b"0".to_vec()),
        (SPARSE_NAME, path.to_vec()),
        (SPARSE_SIZE, size.to_string().into_bytes()),
    ]
    .map(|(key, value)| (key.into(), value))
    .into()
}

/// Writes where the parts lie that are stored of a sparse file: how many, then offset and length of each, a number a line, up to a
/// whole block.
pub fn map(parts: &[(u64, u64)]) -> Vec<u8> {
    let numbers = parts.iter().flat_map(|(at, len)| [*at, *len]);
    let lines = std::iter::once(parts.len() as u64).chain(numbers);
    let mut map: Vec<u8> = lines.flat_map(|n| format!("{n}\n").into_bytes()).collect();
    map.resize(map.len().next_multiple_of(BLOCK as usize), 0);
    map
}

/// Reads that of a file of `size` bytes; returns the parts, in order and apart, and the length of the map.
pub fn read_map(input: &mut impl Read, size: u64) -> io::Result<(Vec<(u64, u64)>, u64)> {
    let senseless = || wrong("where its data lies makes no sense");
    let mut block = [0; BLOCK as usize];
    let (mut at, mut length) = (block.len(), 0);
    let mut line = || {
        let mut number: Option<u64> = None;
        loop {
            if at == block.len() {
                if length == HEAD_MAX {
                    return Err(wrong(HEAD_TOO_LONG));
                }
                input.read_exact(&mut block)?;
                (at, length) = (0, length + block.len());
            }
            let byte = block[at];
            at += 1;
            if let (b'\n', Some(number)) = (byte, number) {
                return Ok(number);
            }
            let digit = char::from(byte).to_digit(10).ok_or_else(senseless)?;
            let next = number.unwrap_or(0).checked_mul(10);
            number = next.and_then(|n| n.checked_add(digit.into()));
            number.ok_or_else(senseless)?;
        }
    };
    let (mut parts, mut end) = (Vec::new(), 0);
    for _ in 0..line()? {
        let (from, len): (u64, u64) = (line()?, line()?);
        let to = from.checked_add(len).filter(|to| *to <= size);
        if from < end {
            return Err(senseless());
        }
        end = to.ok_or_else(senseless)?;
        parts.push((from, len));
    }
    Ok((parts, length as u64))
}

/// The names of GNU tar end with a NUL.
fn without_end(mut name: Vec<u8>) -> Vec<u8> {
    if name.last() == Some(&0) {
        name.pop();
    }
    name
}

/// PAX records: `length SP key = value LF`, where the length counts all of that.
#[derive(Default, Debug, PartialEq)]
pub struct Records(BTreeMap<Vec<u8>, Vec<u8>>);

impl Records {
    pub fn parse(mut bytes: &[u8]) -> io::Result<Records> {
        let mut out = BTreeMap::new();
        while !bytes.is_empty() {
            let (key, value, rest) =
                record(bytes).ok_or_else(|| wrong("a PAX record is malformed"))?;
            out.insert(key.to_vec(), value.to_vec());
            bytes = rest;
        }
        Ok(Records(out))
    }

    /// What a record says; one without a value says nothing.
    pub fn get(&self, key: &str) -> Option<&[u8]> {
        let value = self.0.get(key.as_bytes())?;
        (!value.is_empty()).then_some(value)
    }

    fn number(&self, key: &str) -> io::Result<Option<u64>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let digits = value.iter().all(u8::is_ascii_digit);
        let number = str::from_utf8(value).ok().filter(|_| digits);
        match number.and_then(|text| text.parse().ok()) {
            Some(number) => Ok(Some(number)),
            None => Err(wrong(format!("its PAX record {key} is no number"))),
        }
    }

    /// The records whose keys begin so, with the rests of their keys.
    pub fn below<'s>(&'s self, prefix: &'s str) -> impl Iterator<Item = (&'s [u8], &'s [u8])> {
        let rest = move |(key, value): (&'s Vec<u8>, &'s Vec<u8>)| {
            Some((key.strip_prefix(prefix.as_bytes())?, value.as_slice()))
        };
        self.0.iter().filter_map(rest)
    }
}

/// Takes the first record: key, value, and what is behind it.
fn record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = bytes.iter().take(20).position(|b| *b == b' ')?;
    let digits = bytes[..space].iter().all(u8::is_ascii_digit);
    let length = str::from_utf8(&bytes[..space]).ok().filter(|_| digits)?;
    let (record, rest) = bytes.split_at_checked(length.parse().ok()?)?;
    let (end, body) = record.get(space + 1..)?.split_last()?;
    let equals = body.iter().position(|b| *b == b'=')?;
    (*end == b'\n' && equals > 0).then_some((&body[..equals], &body[equals + 1..], rest))
}

/// A time as PAX writes it: seconds and a fraction.
pub fn time_text(time: i64) -> String {
    let sign = if time < 0 { "-" } else { "" };
    let nanos = time.unsigned_abs();
    let (seconds, nanos) = (nanos / 1_000_000_000, nanos % 1_000_000_000);
    format!("{sign}{seconds}.{nanos:09}")
}

fn parse_time(text: &str) -> Option<i64> {
    let digits = text.strip_prefix('-').unwrap_or(text);
    let (seconds, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let all_digits = |part: &str| part.bytes().all(|b| b.is_ascii_digit());
    if !all_digits(seconds) || !all_digits(fraction) {
        return None;
    }
    let nanos = fraction.bytes().chain(std::iter::repeat(b'0')).take(9);
    let nanos = nanos.fold(0, |sum, digit| sum * 10 + i128::from(digit - b'0'));
    let time = i128::from(seconds.parse::<u64>().ok()?) * 1_000_000_000 + nanos;
    let time = if digits.len() < text.len() {
        -time
    } else {
        time
    };
    time.try_into().ok()
}

/// The name of an extended attribute as a key may hold it: GNU tar writes it so too.
pub fn escape(name: &str) -> String {
    name.replace('%', "%25").replace('=', "%3D")
}

pub fn unescape(name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((&first, tail)) = rest.split_first() {
        let (byte, after) = match rest.get(..3) {
            Some(b"%25") => (b'%', &rest[3..]),
            Some(b"%3D") => (b'=', &rest[3..]),
            _ => (first, tail),
        };
        out.push(byte);
        rest = after;
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::collection::{btree_map, vec};
    use proptest::prelude::*;

    use super::*;
    use crate::hostile;

    fn encode(records: &BTreeMap<Vec<u8>, Vec<u8>>) -> Vec<u8> {
        let mut out = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let mut length = rest + 1;
            while length < rest + length.to_string().len() {
                length += 1;
            }
            out.extend_from_slice(format!("{length} ").as_bytes());
            out.extend_from_slice(&[key, &b"="[..], value, b"\n"].concat());
        }
        out
    }

    fn records() -> impl Strategy<Value = BTreeMap<Vec<u8>, Vec<u8>>> + Clone {
        let key = "[a-zA-Z.]{1,12}".prop_map(String::into_bytes);
        btree_map(key, vec(any::<u8>(), 0..120), 0..6)
    }

    proptest! {
        #[test]
        fn records_come_back_as_they_were(records in records()) {
            prop_assert_eq!(Records::parse(&encode(&records)).unwrap(), Records(records));
        }

        #[test]
        fn hostile_records_are_read_by_their_lengths_or_refused(bytes in hostile::bytes(records().prop_map(|r| encode(&r)))) {
            if let Ok(Records(found)) = Records::parse(&bytes) {
                let held: usize = found.iter().map(|(key, value)| key.len() + value.len()).sum();
                prop_assert!(held <= bytes.len());
                prop_assert_eq!(Records::parse(&encode(&found)).unwrap(), Records(found));
            }
            Head::parse(&bytes).ok();
        }

        #[test]
        fn every_time_survives(time: i64, text in hostile::text(any::<i64>().prop_map(time_text))) {
            prop_assert_eq!(parse_time(&time_text(time)), Some(time));
            if let Some(time) = parse_time(&text) {
                prop_assert_eq!(parse_time(&time_text(time)), Some(time));
            }
        }

        #[test]
        fn names_of_attributes_survive(name in "[a%=2-5D]{0,12}") {
            let key = escape(&name);
            prop_assert!(!key.contains('='));
            prop_assert_eq!(unescape(key.as_bytes()), name.into_bytes());
        }
    }

    #[test]
    fn times_that_are_none_are_told_from_times() {
        for text in [
            "",
            "-",
            "--1",
            "+1",
            "1.-5",
            "1.5x",
            "abc",
            "9223372037",
            "1e9",
        ] {
            assert_eq!(parse_time(text), None, "{text}");
        }
        assert_eq!(parse_time("1.5"), Some(1_500_000_000));
        assert_eq!(parse_time("-0.5"), Some(-500_000_000));
        assert_eq!(parse_time("9223372036.854775807999"), Some(i64::MAX));
        assert_eq!(time_text(-1_500_000_001), "-1.500000001");
    }
}
