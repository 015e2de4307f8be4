//! Every key of the family `meta`, in one table. Numbers are big-endian, so that records of one kind lie in order.
//!
//! ```text
//! "!format"                   format version, u32
//! "!next-volume", "!next-ino" counters, u64
//! "!rounds"                   how far settling is (JSON)
//! 'v' ‖ volume id             volume record (JSON)
//! 'n' ‖ name                  volume id, u64
//! 'r' ‖ volume id ‖ number    version record (JSON)
//! 'd' ‖ volume id ‖ number    the version was set aside as damaged (why)
//! 'p' ‖ volume id ‖ number    the version is pinned
//! 'f' ‖ fork id               fork record (JSON)
//! 's' ‖ fork id               the spool of that fork is kept (nothing)
//! 'z' ‖ dictionary id         what small chunks are packed with, as a stored value
//! 'l' ‖ fork id ‖ number      inode numbers that a fork took since its last commit: how many, u64
//! 'u' ‖ first number          free inode numbers: how many, u64
//! ```

pub const FORMAT: &[u8] = b"!format";
pub const NEXT_VOLUME: &[u8] = b"!next-volume";
pub const NEXT_INO: &[u8] = b"!next-ino";
pub const ROUNDS: &[u8] = b"!rounds";

pub const VOLUME: u8 = b'v';
pub const NAME: u8 = b'n';
pub const VERSION: u8 = b'r';
pub const DAMAGED: u8 = b'd';
pub const PIN: u8 = b'p';
pub const FORK: u8 = b'f';
pub const LEASE: u8 = b'l';
pub const FREE: u8 = b'u';
pub const SPOOL: u8 = b's';
pub const DICTIONARY: u8 = b'z';

/// Returns the key of a record named by one number.
pub fn one(kind: u8, id: u64) -> Vec<u8> {
    [&[kind][..], &id.to_be_bytes()].concat()
}

/// Returns the key of a record named by two numbers, such as a version's.
pub fn two(kind: u8, first: u64, second: u64) -> Vec<u8> {
    [&[kind][..], &first.to_be_bytes(), &second.to_be_bytes()].concat()
}

/// Returns the key of the index entry of a volume's name.
pub fn name(name: &str) -> Vec<u8> {
    [&[NAME][..], name.as_bytes()].concat()
}

/// Reads a number behind the first byte of a key.
pub fn number(key: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(key.get(1..9)?.try_into().ok()?))
}

/// Reads the second number of a key of two.
pub fn second_number(key: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(key.get(9..17)?.try_into().ok()?))
}
