//! What programs see while commits go on beside them.

use std::sync::atomic::AtomicU32;

use super::*;

#[test]
fn reads_beside_commits_and_rewrites_never_give_older_bytes_or_those_of_other_files() {
    const FILES: usize = 8;
    const LEN: usize = 12_000;
    let bench = Bench::new();
    let id = bench.fork("v");
    let fs = bench.fs(id);
    let stamp = |file: usize, round: u32| {
        let word = (file as u32) << 24 | round;
        word.to_le_bytes().repeat(LEN / 4)
    };
    let inos: Vec<Ino> = (0..FILES)
        .map(|n| put(&fs, &format!("f{n}"), &stamp(n, 0)))
        .collect();
    let written: Vec<AtomicU32> = (0..FILES).map(|_| AtomicU32::new(0)).collect();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for part in 0..2 {
            let (over, written, inos, fs) = (&over, &written, &inos, &fs);
            scope.spawn(move || {
                let mut round = 0;
                while !over.load(Ordering::Acquire) {
                    round += 1;
                    for file in (part..FILES).step_by(2) {
                        fs.write(ME, inos[file], 0, &stamp(file, round), false)
                            .unwrap();
                        written[file].store(round, Ordering::Release);
                    }
                }
            });
            scope.spawn(move || {
                while !over.load(Ordering::Acquire) {
                    for file in 0..FILES {
                        let least = written[file].load(Ordering::Acquire);
                        let bytes = fs.read(inos[file], 0, LEN).unwrap();
                        let word = u32::from_le_bytes(bytes[..4].try_into().unwrap());
                        assert_eq!(bytes, stamp(file, word & 0xff_ffff), "torn");
                        assert_eq!(word >> 24, file as u32, "another file's bytes");
                        assert!(word & 0xff_ffff >= least, "older than acknowledged");
                    }
                }
            });
        }
        for _ in 0..60 {
            bench.commit(id, true);
        }
        over.store(true, Ordering::Release);
    });
    check(&bench);
}
