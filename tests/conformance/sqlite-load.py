"""Several processes move money between accounts of one SQLite database, others read meanwhile: the sum never changes.

    sqlite-load.py DATABASE JOURNAL_MODE TRANSACTIONS     sets the database up where it is missing, then runs the load
    sqlite-load.py DATABASE                               checks it: integrity, and the sum
"""
import multiprocessing
import random
import sqlite3
import sys

ACCOUNTS = 500


def connect(path):
    return sqlite3.connect(path, timeout=600, isolation_level=None)


def set_up(path, mode):
    db = connect(path)
    got = db.execute(f"PRAGMA journal_mode={mode}").fetchone()[0]
    assert got == mode, f"the journal mode is {got}, not {mode}"
    db.execute("BEGIN IMMEDIATE")
    db.execute("CREATE TABLE IF NOT EXISTS account (id INTEGER PRIMARY KEY, money INTEGER, note BLOB)")
    rows = ((number, 1000, bytes(300)) for number in range(ACCOUNTS))
    db.executemany("INSERT OR IGNORE INTO account VALUES (?, ?, ?)", rows)
    db.execute("COMMIT")
    db.close()


def check(db):
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert_sum(db)


def assert_sum(db):
    total = db.execute("SELECT sum(money) FROM account").fetchone()[0]
    assert total == 1000 * ACCOUNTS, f"the sum is {total}"


def write(path, seed, transactions):
    chance = random.Random(seed)
    db = connect(path)
    for _ in range(transactions):
        source, target = chance.sample(range(ACCOUNTS), 2)
        amount = chance.randrange(100)
        db.execute("BEGIN IMMEDIATE")
        db.execute("UPDATE account SET money = money - ?, note = randomblob(?) WHERE id = ?", (amount, chance.randrange(2000), source))
        db.execute("UPDATE account SET money = money + ? WHERE id = ?", (amount, target))
        db.execute("ROLLBACK" if chance.randrange(10) == 0 else "COMMIT")
    db.close()


def read(path, reads):
    db = connect(path)
    for _ in range(reads):
        assert_sum(db)
    db.close()


def main():
    path = sys.argv[1]
    if len(sys.argv) > 2:
        mode, transactions = sys.argv[2], int(sys.argv[3])
        set_up(path, mode)
        workers = [multiprocessing.Process(target=write, args=(path, seed, transactions)) for seed in (1, 2, 3)]
        workers += [multiprocessing.Process(target=read, args=(path, transactions)) for _ in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert all(worker.exitcode == 0 for worker in workers), "a worker failed"
    check(connect(path))


if __name__ == "__main__":
    main()
