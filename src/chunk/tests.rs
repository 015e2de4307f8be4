use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::hostile::{self, assert_format, hex};

fn noise(len: usize, mut seed: u64) -> Vec<u8> {
    std::iter::repeat_with(|| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed as u8
    })
    .take(len)
    .collect()
}

fn cuts(data: &[u8]) -> Vec<usize> {
    let mut at = 0;
    let mut out = Vec::new();
    while at < data.len() {
        at += first_cut(&data[at..], true).unwrap();
        out.push(at);
    }
    out
}

#[test]
fn what_is_compressed_already_is_kept_as_it_is_and_nothing_else() {
    let random = noise(64 << 10, 9);
    assert!(is_dense(&random) && !is_dense(&random[..LONG - 1]));
    assert_eq!(pack(&random, 3)[0], RAW);
    let text: Vec<u8> = random.iter().map(|byte| b'a' + byte % 64).collect();
    // Half of it is zeros, as in a file with room ahead.
    let mut half = random.clone();
    half[..32 << 10].fill(0);
    for (what, raw) in [("text", text), ("half", half), ("zeros", vec![0; 64 << 10])] {
        let packed = pack(&raw, 3);
        assert_eq!(packed[0], ZSTD, "{what}");
        assert_eq!(unpack(&packed, MAX).unwrap(), raw);
    }
}

#[test]
fn cutting_resynchronises_behind_an_edit() {
    let data = noise(4 << 20, 3);
    let mut edited = data.clone();
    edited.splice(1_000_000..1_000_100, noise(300, 5));
    let (a, b) = (cuts(&data), cuts(&edited));
    let same = b
        .iter()
        .rev()
        .zip(a.iter().rev())
        .take_while(|(x, y)| **x == **y + 200)
        .count();
    assert!(same > a.len() / 2, "{same} of {} cuts", a.len());
}

#[test]
fn a_cut_is_the_same_whether_all_bytes_are_there_or_only_enough() {
    let data = noise(3 << 20, 9);
    let mut at = 0;
    for cut in cuts(&data) {
        let seen = &data[at..data.len().min(at + MAX + 1)];
        let first = first_cut(seen, at + seen.len() == data.len());
        assert_eq!(first, Some(cut - at));
        at = cut;
    }
    assert_eq!(first_cut(&data[..MAX], false), None);
}

#[test]
fn stored_values_come_back_and_never_allocate_more_than_allowed() {
    for raw in [Vec::new(), [7].repeat(100_000), noise(5000, 1)] {
        assert_eq!(unpack(&pack(&raw, 3), 100_000), Ok(raw));
    }
    assert_eq!(pack(&noise(5000, 1), 3)[0], RAW);
    assert_eq!(
        unpack(&pack(&[7].repeat(100_000), 3), 99_999),
        Err(PackError::TooLong)
    );
    assert_eq!(unpack(&[9, 0], 10), Err(PackError::Codec(9)));
}

/// Bytes that compress, and such as do not.
fn raws() -> impl Strategy<Value = Vec<u8>> + Clone {
    prop_oneof![
        vec(any::<u8>(), 0..600),
        (vec(any::<u8>(), 1..20), 1_usize..200).prop_map(|(piece, count)| piece.repeat(count)),
    ]
}

fn packed_small(raw: &[u8]) -> Vec<u8> {
    let mut packer = Packer::new(Some(&dictionary())).unwrap();
    packer.pack(raw, usize::MAX).unwrap()
}

#[test]
fn a_stored_value_that_says_less_than_it_holds_is_refused() {
    let bomb = pack(&vec![0; 64 << 20], 3);
    assert!(bomb.len() < 100_000);
    assert_eq!(unpack(&bomb, MAX), Err(PackError::TooLong));
    let mut lying = vec![ZSTD, 100];
    lying.extend_from_slice(&bomb[5..]);
    assert_eq!(unpack(&lying, MAX), Err(PackError::Payload));
}

const LIKE_IT: &[u8] = b"the lazy dog jumps over the quick brown fox";

fn dictionary() -> Dictionary {
    Dictionary::new(300, b"the quick brown fox jumps over the lazy dog".to_vec())
}

#[test]
fn values_are_packed_with_the_dictionary_where_that_is_shorter() {
    let dictionary = Arc::new(dictionary());
    let mut packer = Packer::new(Some(&dictionary)).unwrap();
    let packed = packer.pack(LIKE_IT, LIKE_IT.len()).unwrap();
    assert_eq!(packed[..4], hex("02 2b ac02"));
    let find = |id: u64| (id == 300).then(|| dictionary.clone());
    assert_eq!(unpack_with(&packed, 100, find), Ok(LIKE_IT.to_vec()));
    assert_eq!(packer.pack(LIKE_IT, packed.len()), None);
    assert_eq!(packer.pack(&noise(5000, 1), 5000), None);
    let large = [7].repeat(MAX);
    let packed = packer.pack(&large, 100).unwrap();
    assert_eq!(unpack_with(&packed, MAX, find), Ok(large.clone()));
    let packed = Packer::new(None).unwrap().pack(&large, 100).unwrap();
    assert_eq!(unpack(&packed, MAX), Ok(large));
}

#[test]
fn a_dictionary_is_as_large_as_its_samples_are_worth() {
    for (samples, bytes) in [(1 << 20, 112 << 10), (16 << 20, 512 << 10)] {
        let row = noise(samples, 5);
        let dictionary = Dictionary::train(1, &row, &vec![4096; samples / 4096]).unwrap();
        assert_eq!(dictionary.bytes().len(), bytes);
        assert!(bytes <= DICTIONARY_MAX);
    }
}

#[test]
fn the_format_of_stored_values_is_kept() {
    assert_format("a raw value", &pack(b"abc", 3), "00 03 616263");
    assert_format("a raw value without bytes", &pack(b"", 3), "00 00");
    assert_eq!(unpack(&hex("00 03 616263"), 3), Ok(b"abc".to_vec()));
    // How zstd writes a value may change; that it is read may not.
    let zstd = "01 e807 28b52ffd60e8024d00001007070100e32b8005";
    assert_eq!(
        unpack(&hex(zstd), 1000),
        Ok([7].repeat(1000)),
        "raise the format version"
    );
    for codec in [3, 255] {
        assert_eq!(unpack(&[codec, 0], 9), Err(PackError::Codec(codec)));
    }
    let dictionary = Arc::new(dictionary());
    let find = |id: u64| (id == 300).then(|| dictionary.clone());
    let small = hex("02 2b ac02 28b52ffd202b6500000874030046f0e0a80337ca15");
    assert_eq!(
        unpack_with(&small, 100, find),
        Ok(LIKE_IT.to_vec()),
        "raise the format version"
    );
    assert_eq!(unpack(&small, 100), Err(PackError::Dictionary(300)));
    assert_eq!(unpack_with(&small, 42, find), Err(PackError::TooLong));
}

#[test]
fn the_format_of_what_stays_in_a_spool_is_kept_and_nothing_else_is_believed() {
    let place = Place {
        spool: 0x1234,
        offset: 300,
        len: 100_000,
    };
    assert_format("a chunk in a spool", &place.stored(), "03 a08d06 b424 ac02");
    assert_eq!(Place::of(&place.stored(), MAX), Ok(Some(place)));
    assert_eq!(Place::of(&pack(b"abc", 3), MAX), Ok(None));
    assert_eq!(Place::of(&place.stored(), 99_999), Err(PackError::TooLong));
    let ends_beyond = "03 01 01 ffffffffffffffffff01";
    for digits in ["03", "03 01", "03 01 01", "03 01 01 01 00", ends_beyond] {
        assert_eq!(
            Place::of(&hex(digits), MAX),
            Err(PackError::Head),
            "{digits}"
        );
    }
}

#[test]
fn the_format_of_numbers_is_kept() {
    for (number, digits) in [
        (0, "00"),
        (127, "7f"),
        (128, "8001"),
        (300, "ac02"),
        (u64::MAX, "ffffffffffffffffff01"),
    ] {
        let mut bytes = Vec::new();
        varint::put(&mut bytes, number);
        assert_format("a number", &bytes, digits);
        assert_eq!(varint::take(&mut hex(digits).as_slice()), Some(number));
    }
    for digits in ["8000", "ffffffffffffffffff02", "80", ""] {
        assert_eq!(varint::take(&mut hex(digits).as_slice()), None, "{digits}");
    }
}

#[test]
fn fixed_content_has_fixed_cuts_and_ids() {
    let data = noise(1 << 20, 11);
    assert_format(
        "the hash of content",
        &ChunkId::of(&data).0,
        "ffa8679e1cb3f8897a7bf5db445697904720a2b97fc6c14a9996767ed0b3be8e",
    );
    let mut from = 0;
    let mut ids = blake3::Hasher::new();
    let found = cuts(&data);
    for to in &found {
        ids.update(&ChunkId::of(&data[from..*to]).0);
        from = *to;
    }
    let wanted = [
        104243, 182329, 248343, 315092, 401461, 478774, 546626, 622001, 677264, 751345, 786645,
        820863, 905137, 957951, 1027656, 1048576,
    ];
    assert_eq!(
        found, wanted,
        "content is cut elsewhere: raise the format version"
    );
    assert_format(
        "the ids of chunks",
        ids.finalize().as_bytes(),
        "e38e752fc013337fea9a7246feacdf9a5c0fa00a4cd99182447e1238aa5d3c23",
    );
    // The same bytes over and over have no cut of their own: the longest chunk ends them.
    assert_eq!(cuts(&vec![0; 600 << 10]), [MAX, 2 * MAX, 600 << 10]);
}

proptest! {
    #[test]
    fn stored_bytes_give_no_more_than_was_allowed(bytes in hostile::bytes(raws().prop_map(|raw| pack(&raw, 3))), max in 0_usize..5000) {
        if let Ok(raw) = unpack(&bytes, max) {
            prop_assert!(raw.len() <= max && raw.capacity() <= max.max(bytes.len()));
            prop_assert_eq!(unpack(&pack(&raw, 3), max), Ok(raw));
        }
    }

    #[test]
    fn what_names_a_dictionary_gives_no_more_than_was_allowed(bytes in hostile::bytes(raws().prop_map(|raw| packed_small(&raw))), max in 0_usize..5000) {
        let known = Arc::new(dictionary());
        if let Ok(raw) = unpack_with(&bytes, max, |_| Some(known.clone())) {
            prop_assert!(raw.len() <= max && raw.capacity() <= max.max(bytes.len()));
        }
    }

    #[test]
    fn what_was_packed_small_comes_back(raw in raws()) {
        let known = Arc::new(dictionary());
        prop_assert_eq!(unpack_with(&packed_small(&raw), raw.len(), |_| Some(known.clone())), Ok(raw));
    }

    #[test]
    fn what_was_stored_comes_back(raw in raws(), level in 0_i32..6) {
        prop_assert_eq!(unpack(&pack(&raw, level), raw.len()), Ok(raw));
    }

    #[test]
    fn numbers_have_one_form(number: u64, bytes: [u8; 11]) {
        let mut out = Vec::new();
        varint::put(&mut out, number);
        assert_eq!(varint::take(&mut out.as_slice()), Some(number));
        let mut rest = &bytes[..];
        if let Some(number) = varint::take(&mut rest) {
            let mut again = Vec::new();
            varint::put(&mut again, number);
            assert_eq!(again, bytes[..bytes.len() - rest.len()]);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn cuts_far_behind_any_edit_are_those_without_it(seed in 1_u64.., at in 0_usize..1_000_000, gone in 0_usize..3_000, new in 0_usize..3_000) {
        let data = noise(6 << 20, seed);
        let mut edited = data.clone();
        edited.splice(at..at + gone, noise(new, seed ^ 1 | 2));
        let far = at + gone + 8 * MAX;
        let behind = |cuts: Vec<usize>, from: usize, end: usize| -> Vec<usize> {
            cuts.into_iter().filter(|cut| *cut > from).map(|cut| end - cut).collect()
        };
        let a = behind(cuts(&data), far, data.len());
        let b = behind(cuts(&edited), far - gone + new, edited.len());
        prop_assert!(far < data.len() && !a.is_empty());
        prop_assert_eq!(a, b);
    }
}
