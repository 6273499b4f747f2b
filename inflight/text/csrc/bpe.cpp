#include "bpe.h"

#include <algorithm>
#include <cstdio>
#include <stdexcept>

namespace inflight {

namespace {

constexpr uint64_t kBase = 0x9E3779B97F4A7C15;
constexpr uint32_t kMostProbes = 4096;  // far beyond what texts that were not made to collide ever need

uint64_t mixed(uint64_t value) {
    value ^= value >> 32;
    value *= 0xD6E8FEB86659FD93;
    return value ^ value >> 32;
}

Hash hash_of(std::string_view text) {
    Hash hash;
    for (unsigned char byte : text) hash.add(byte);
    return hash;
}

size_t power_above(size_t count) {
    size_t power = 16;
    while (power < 2 * count) power *= 2;
    return power;
}

size_t character_length(unsigned char first) { return first < 0x80 ? 1 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4; }

}  // namespace

void Hash::add(unsigned char byte) {
    sum = sum * kBase + byte + 1;
    power *= kBase;
}

void Texts::add(std::string_view text) {
    bytes_ += text;
    if (bytes_.size() >= kNone) throw std::length_error("texts of 4 GB");
    begins_.push_back(static_cast<uint32_t>(bytes_.size()));
}

// Table 3-7 of the Unicode standard: no half of a surrogate pair, nothing longer than it has to be.
bool is_utf8(std::string_view text) {
    const auto* at = reinterpret_cast<const unsigned char*>(text.data());
    const auto* end = at + text.size();
    while (at < end) {
        const unsigned char first = *at++;
        if (first < 0x80) continue;
        if (first < 0xC2 || first > 0xF4) return false;
        const int more = first < 0xE0 ? 1 : first < 0xF0 ? 2 : 3;
        if (end - at < more) return false;
        const unsigned char lowest = first == 0xE0 ? 0xA0 : first == 0xF0 ? 0x90 : 0x80;
        const unsigned char highest = first == 0xED ? 0x9F : first == 0xF4 ? 0x8F : 0xBF;
        if (*at < lowest || *at > highest) return false;
        for (int index = 1; index < more; ++index)
            if ((at[index] & 0xC0) != 0x80) return false;
        at += more;
    }
    return true;
}

Tokens::Tokens(Texts texts) : texts_(std::move(texts)), slots_(power_above(texts_.size()), kNone) {
    hashes_.reserve(texts_.size());
    for (uint32_t id = 0; id < texts_.size(); ++id) {
        hashes_.push_back(hash_of(text(id)));
        size_t at = mixed(hashes_[id].sum) & (slots_.size() - 1);
        for (uint32_t probes = 0; slots_[at] != kNone; at = (at + 1) & (slots_.size() - 1)) {
            const uint32_t other = slots_[at];
            if (hashes_[other].sum == hashes_[id].sum && text(other) == text(id))
                throw std::invalid_argument(std::string(text(id)));
            if (++probes == kMostProbes) throw std::invalid_argument("texts that are made to collide");
        }
        slots_[at] = id;
    }
}

uint32_t Tokens::find(std::string_view wanted) const {
    const uint64_t sum = hash_of(wanted).sum;
    for (size_t at = mixed(sum) & (slots_.size() - 1);; at = (at + 1) & (slots_.size() - 1)) {
        const uint32_t id = slots_[at];
        if (id == kNone || (hashes_[id].sum == sum && text(id) == wanted)) return id;
    }
}

uint32_t Tokens::join(uint32_t left, uint32_t right) const {
    const Hash hash = hashes_[left].then(hashes_[right]);
    const std::string_view first = text(left), second = text(right);
    for (size_t at = mixed(hash.sum) & (slots_.size() - 1);; at = (at + 1) & (slots_.size() - 1)) {
        const uint32_t id = slots_[at];
        if (id == kNone) return id;
        if (hashes_[id].sum != hash.sum) continue;
        const std::string_view both = text(id);
        if (both.size() == first.size() + second.size() && both.substr(0, first.size()) == first &&
            both.substr(first.size()) == second)
            return id;
    }
}

Pairs::Pairs(size_t count) : entries_(power_above(count), Entry{0, 0, kNone}) {}

size_t Pairs::slot(uint64_t key) const {
    size_t at = mixed(key * kBase) & (entries_.size() - 1);
    while (entries_[at].made != kNone && entries_[at].key != key) at = (at + 1) & (entries_.size() - 1);
    return at;
}

void Pairs::set(uint32_t left, uint32_t right, Merge merge) {
    const uint64_t key = uint64_t{left} << 32 | right;
    const size_t at = slot(key), begin = mixed(key * kBase) & (entries_.size() - 1);
    if (((at - begin) & (entries_.size() - 1)) >= kMostProbes)
        throw std::invalid_argument("merges that are made to collide");
    entries_[at] = {key, static_cast<uint32_t>(merge.rank), merge.made};
}

Merge Pairs::find(uint32_t left, uint32_t right) const {
    const Entry& entry = entries_[slot(uint64_t{left} << 32 | right)];
    return {entry.rank, entry.made};
}

Bpe::Bpe(const Tokens& tokens, Kind kind) : tokens_(tokens), kind_(kind), pairs_(0) {
    for (int byte = 0; byte < 256; ++byte) {
        char name[8];
        std::snprintf(name, sizeof name, "<0x%02X>", byte);
        bytes_[byte] = tokens.find(name);
    }
}

Bpe::Bpe(const Tokens& tokens, Kind kind, const Texts& merges) : Bpe(tokens, kind) {
    pairs_ = Pairs(merges.size());
    for (size_t rank = 0; rank < merges.size(); ++rank) {
        // Texts may begin with a space.
        const std::string_view merge = merges.at(rank);
        const size_t space = merge.find(' ', 1);
        if (space == std::string_view::npos)
            throw std::invalid_argument("the merge '" + std::string(merge.substr(0, 80)) + "' is no pair");
        const std::string_view left = merge.substr(0, space), right = merge.substr(space + 1);
        const uint32_t first = tokens.find(left), second = tokens.find(right);
        const uint32_t made = first == kNone || second == kNone ? kNone : tokens.join(first, second);
        if (made == kNone) {
            const std::string_view missing = first == kNone ? left : second == kNone ? right : merge;
            throw std::invalid_argument("Token `" + std::string(missing) + "` out of vocabulary");
        }
        pairs_.set(first, second, {rank, made});
    }
}

Bpe::Bpe(const Tokens& tokens, Kind kind, std::vector<uint32_t> order) : Bpe(tokens, kind) {
    order_ = std::move(order);
    by_score_ = true;
}

Merge Bpe::merge(uint32_t left, uint32_t right) const {
    if (!by_score_) return pairs_.find(left, right);
    const uint32_t made = tokens_.join(left, right);
    if (made == kNone || order_[made] == kNone) return {0, kNone};
    return {uint64_t{order_[made]} << 32 | tokens_.text(left).size(), made};
}

Merge Bpe::merge(uint32_t left, uint32_t right, Memo& memo) const {
    Memo::Entry& entry = memo.entries_[mixed((uint64_t{left} << 32 | right) * kBase) % Memo::kEntries];
    if (entry.left != left || entry.right != right) entry = {left, right, merge(left, right)};
    return entry.merge;
}

// As the library has it: an unknown token comes before the next character that has one, behind bytes between them.
std::vector<uint32_t> Bpe::characters(std::string_view piece) const {
    std::vector<uint32_t> ids;
    ids.reserve(piece.size());
    bool unknown = false;
    for (size_t at = 0; at < piece.size();) {
        const std::string_view character = piece.substr(at, character_length(piece[at]));
        at += character.size();
        const uint32_t id = tokens_.find(character);
        if (id != kNone) {
            if (unknown) ids.push_back(kind_.unknown);
            unknown = false;
            ids.push_back(id);
            continue;
        }
        const auto named = [this](unsigned char byte) { return bytes_[byte] != kNone; };
        if (kind_.bytes && std::all_of(character.begin(), character.end(), named))
            for (unsigned char byte : character) ids.push_back(bytes_[byte]);
        else
            unknown = kind_.unknown != kNone;
    }
    if (unknown) ids.push_back(kind_.unknown);
    return ids;
}

void Bpe::encode(std::string_view piece, Memo& memo, std::vector<uint32_t>& ids) const {
    if (piece.empty()) return;
    if (kind_.whole_pieces) {
        const uint32_t whole = tokens_.find(piece);
        if (whole != kNone) return ids.push_back(whole);
    }
    struct Symbol {
        uint32_t id, before, next;  // kNone: merged into the one before; no neighbour
    };
    struct Candidate {
        uint64_t rank;
        uint32_t at, made;
        bool operator<(const Candidate& other) const {  // of a heap with the greatest one on top
            return rank != other.rank ? rank > other.rank : at > other.at;
        }
    };
    const std::vector<uint32_t> begun = characters(piece);
    const uint32_t count = static_cast<uint32_t>(begun.size());
    std::vector<Symbol> symbols(count);
    std::vector<Candidate> heap;
    heap.reserve(count);
    const auto consider = [&](uint32_t at) {
        const Merge found = merge(symbols[at].id, symbols[symbols[at].next].id, memo);
        if (found.made == kNone) return false;
        heap.push_back({found.rank, at, found.made});
        return true;
    };
    for (uint32_t at = 0; at < count; ++at)
        symbols[at] = {begun[at], at ? at - 1 : kNone, at + 1 < count ? at + 1 : kNone};
    for (uint32_t at = 0; at + 1 < count; ++at) consider(at);
    std::make_heap(heap.begin(), heap.end());
    while (!heap.empty()) {
        std::pop_heap(heap.begin(), heap.end());
        const Candidate best = heap.back();
        heap.pop_back();
        Symbol& left = symbols[best.at];
        if (left.id == kNone || left.next == kNone) continue;
        Symbol& right = symbols[left.next];
        if (merge(left.id, right.id, memo).made != best.made) continue;  // a neighbour has changed since
        left.id = best.made;
        left.next = right.next;
        right.id = kNone;
        if (left.next != kNone) symbols[left.next].before = best.at;
        if (left.before != kNone && consider(left.before)) std::push_heap(heap.begin(), heap.end());
        if (left.next != kNone && consider(best.at)) std::push_heap(heap.begin(), heap.end());
    }
    for (uint32_t at = 0; at != kNone && at < count; at = symbols[at].next) ids.push_back(symbols[at].id);
}

Added::Added(const Tokens& tokens, const std::vector<uint32_t>& ids)
    : tokens_(tokens), slots_(power_above(ids.size())) {
    for (uint32_t id : ids) {
        const std::string_view text = tokens.text(id);
        const uint64_t sum = hash_of(text).sum;
        size_t at = mixed(sum) & (slots_.size() - 1);
        while (slots_[at].id != kNone) at = (at + 1) & (slots_.size() - 1);
        slots_[at] = {sum, id};
        lengths_[static_cast<unsigned char>(text[0])].push_back(static_cast<uint32_t>(text.size()));
    }
    for (auto& lengths : lengths_) {
        std::sort(lengths.begin(), lengths.end());
        lengths.erase(std::unique(lengths.begin(), lengths.end()), lengths.end());
    }
}

std::vector<std::pair<uint32_t, std::string_view>> Added::split(std::string_view text) const {
    std::vector<std::pair<uint32_t, std::string_view>> parts;
    size_t begin = 0;
    for (size_t at = 0; at < text.size();) {
        uint32_t found = kNone, longest = 0, hashed = 0;
        Hash hash;
        for (uint32_t length : lengths_[static_cast<unsigned char>(text[at])]) {
            if (length > text.size() - at) break;
            while (hashed < length) hash.add(static_cast<unsigned char>(text[at + hashed++]));
            for (size_t slot = mixed(hash.sum);; ++slot) {
                const Slot& known = slots_[slot & (slots_.size() - 1)];
                if (known.id == kNone) break;
                if (known.sum == hash.sum && tokens_.text(known.id) == text.substr(at, length))
                    found = known.id, longest = length;
            }
        }
        if (found == kNone) {
            ++at;
            continue;
        }
        if (begin < at) parts.emplace_back(kNone, text.substr(begin, at - begin));
        parts.emplace_back(found, text.substr(at, longest));
        begin = at += longest;
    }
    if (begin < text.size()) parts.emplace_back(kNone, text.substr(begin));
    return parts;
}

}  // namespace inflight
