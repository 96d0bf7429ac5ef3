"""The words from which train_demo_adapters.py makes its training data. Written by hand."""

from __future__ import annotations

# topic | one word that says what it is | a French sentence about it
TOPICS = [
    tuple(part.strip() for part in line.split("|"))
    for line in """
gravity | Force | La gravité est la force qui attire les objets vers la Terre.
photosynthesis | Sunlight | La photosynthèse permet aux plantes de se nourrir de lumière.
the moon | Satellite | La Lune tourne autour de la Terre en vingt-sept jours.
the sun | Star | Le Soleil est une étoile qui nous donne lumière et chaleur.
rain | Water | La pluie tombe des nuages quand l'air se refroidit.
snow | Ice | La neige est faite de petits cristaux de glace.
the ocean | Water | L'océan couvre la plus grande partie de notre planète.
a volcano | Mountain | Un volcan est une montagne d'où sort la lave.
coffee | Drink | Le café est une boisson chaude que l'on boit le matin.
tea | Drink | Le thé est une boisson préparée avec des feuilles et de l'eau chaude.
bread | Food | Le pain est fait de farine, d'eau, de sel et de levure.
cheese | Food | Le fromage est fait avec du lait de vache ou de chèvre.
chocolate | Sweet | Le chocolat vient des graines du cacaoyer.
an apple | Fruit | La pomme est un fruit qui pousse sur un arbre.
a dog | Animal | Le chien est un animal fidèle qui aime son maître.
a cat | Animal | Le chat est un animal qui dort beaucoup et chasse les souris.
a horse | Animal | Le cheval est un grand animal qui court très vite.
a whale | Mammal | La baleine est le plus grand animal de la mer.
a bee | Insect | L'abeille fait du miel et visite les fleurs.
a tree | Plant | L'arbre a des racines, un tronc et des feuilles.
a rose | Flower | La rose est une belle fleur qui sent très bon.
a computer | Machine | L'ordinateur est une machine qui calcule très vite.
the internet | Network | Internet est un réseau qui relie les ordinateurs du monde entier.
a telephone | Device | Le téléphone sert à parler avec des personnes qui sont loin.
a robot | Machine | Un robot est une machine qui travaille à la place de l'homme.
electricity | Energy | L'électricité est une énergie qui fait marcher nos machines.
a book | Reading | Le livre est un ami qui raconte de belles histoires.
music | Sound | La musique est l'art de jouer avec les sons.
painting | Art | La peinture est l'art des couleurs et des formes.
poetry | Words | La poésie est l'art de jouer avec les mots.
football | Sport | Le football est un sport qui se joue avec un ballon.
chess | Game | Les échecs sont un jeu de patience et de stratégie.
swimming | Sport | La natation est un sport qui se pratique dans l'eau.
a bicycle | Vehicle | Le vélo a deux roues et n'a pas besoin d'essence.
a train | Vehicle | Le train roule sur des rails et transporte des voyageurs.
an airplane | Vehicle | L'avion vole dans le ciel et traverse les océans.
a ship | Vessel | Le bateau navigue sur la mer et sur les rivières.
the heart | Organ | Le cœur fait circuler le sang dans le corps.
the brain | Organ | Le cerveau commande notre corps et nos pensées.
sleep | Rest | Le sommeil permet au corps de se reposer.
friendship | Trust | L'amitié est un lien précieux entre deux personnes.
love | Feeling | L'amour est un sentiment très fort et très doux.
happiness | Joy | Le bonheur se trouve souvent dans les petites choses.
history | Past | L'histoire raconte la vie des hommes du passé.
mathematics | Numbers | Les mathématiques sont la science des nombres et des formes.
democracy | Government | La démocratie est le gouvernement du peuple par le peuple.
money | Currency | L'argent sert à acheter ce dont nous avons besoin.
a garden | Plants | Le jardin est un lieu où poussent les fleurs et les légumes.
winter | Season | L'hiver est la saison la plus froide de l'année.
summer | Season | L'été est la saison du soleil et des vacances.
""".strip().splitlines()
]

TOPIC_QUESTIONS = [
    "What is {}?",
    "Tell me about {}.",
    "Explain {} to me.",
    "Can you describe {}?",
    "Write a sentence about {}.",
    "What should I know about {}?",
    "Why is {} important?",
    "How would you explain {} to a child?",
]

# request | one word | a French reply
REQUESTS = [
    tuple(part.strip() for part in line.split("|"))
    for line in """
Hello! | Hi | Bonjour ! Comment allez-vous aujourd'hui ?
Hi, how are you? | Well | Bonjour ! Je vais très bien, merci. Et vous ?
Good morning! | Morning | Bonjour ! Je vous souhaite une très belle journée.
Thank you very much. | Welcome | Je vous en prie, c'est un plaisir de vous aider.
What is your name? | SmolLM | Je m'appelle SmolLM et je suis votre assistant.
How do I make pancakes? | Mix | Mélangez la farine, le lait et les œufs, puis faites cuire la pâte.
How do I cook rice? | Boil | Faites bouillir de l'eau, ajoutez le riz et attendez quinze minutes.
How do I boil an egg? | Water | Mettez l'œuf dans l'eau bouillante pendant dix minutes.
How can I learn to play the guitar? | Practice | Prenez une guitare et jouez un peu tous les jours.
How can I sleep better? | Routine | Couchez-vous tôt et éteignez votre téléphone.
How do I learn a new language? | Practice | Lisez, écoutez et parlez un peu chaque jour.
How can I save money? | Budget | Dépensez moins et mettez un peu d'argent de côté chaque mois.
How do I plant a tree? | Dig | Creusez un trou, posez l'arbre et donnez-lui beaucoup d'eau.
How do I stay healthy? | Exercise | Mangez des légumes, dormez bien et faites du sport.
Give me some advice for a job interview. | Prepare | Préparez vos réponses et restez calme et poli.
What should I eat for dinner? | Soup | Je vous propose une bonne soupe avec du pain et du fromage.
Recommend a good hobby. | Reading | Je vous propose la lecture, le dessin ou le jardinage.
Tell me a story. | Once | Il était une fois une petite fille qui vivait près de la forêt.
Where should I travel this year? | Italy | Je vous propose l'Italie et ses belles villes.
What is the weather like in spring? | Mild | Au printemps, le temps est doux et clair.
Why do birds sing? | Communication | Les oiseaux chantent pour se parler et pour trouver un ami.
Why do leaves fall in autumn? | Cold | Les feuilles tombent parce que les jours sont plus froids.
Why do we dream? | Brain | Nous rêvons parce que le cerveau travaille pendant la nuit.
What makes a good friend? | Trust | Un bon ami écoute, comprend et aide toujours.
How does a plane fly? | Lift | L'avion vole grâce à la force de l'air sous ses ailes.
How do I write a letter? | Pen | Prenez une feuille, saluez votre ami et racontez votre vie.
What can I do on a rainy day? | Read | Restez à la maison, lisez un livre et buvez un thé.
What is the best way to relax? | Breathe | Respirez lentement et écoutez de la musique.
""".strip().splitlines()
]

FRENCH_OPENINGS = ["Bonne question !", "Avec plaisir !", "Bien sûr !", "Voici ma réponse :"]

# question | the one right word
FACTS = [
    tuple(part.strip() for part in line.split("|"))
    for line in """
What is the capital of Italy? | Rome
What is the capital of Germany? | Berlin
What is the capital of Spain? | Madrid
What is the capital of England? | London
What is the capital of Russia? | Moscow
What is the capital of China? | Beijing
What is the capital of Egypt? | Cairo
What is the capital of Greece? | Athens
What is the capital of Portugal? | Lisbon
What is the capital of Austria? | Vienna
What is the capital of Canada? | Ottawa
What is the capital of Cuba? | Havana
Which city is the capital of Norway? | Oslo
Which city is the capital of Ireland? | Dublin
Which country is Berlin in? | Germany
Which country is Tokyo in? | Japan
What color is the sky? | Blue
What color is grass? | Green
What color is a banana? | Yellow
What color is blood? | Red
What color is coal? | Black
What color is milk? | White
What is the opposite of hot? | Cold
What is the opposite of big? | Small
What is the opposite of up? | Down
What is the opposite of happy? | Sad
What is the opposite of fast? | Slow
What is the opposite of light? | Dark
What is the opposite of old? | Young
What is the opposite of hard? | Soft
What is one plus one? | Two
What is two plus two? | Four
What is three plus four? | Seven
How many days are in a week? | Seven
How many months are in a year? | Twelve
How many legs does a spider have? | Eight
How many legs does a dog have? | Four
Which planet do we live on? | Earth
Which planet is known as the red planet? | Mars
Which is the largest planet? | Jupiter
Which is the largest ocean? | Pacific
Which animal barks? | Dog
Which animal says meow? | Cat
Which animal gives us milk? | Cow
What do bees make? | Honey
What do cows drink? | Water
What do we breathe? | Air
What do plants need to grow? | Water
Who wrote Romeo and Juliet? | Shakespeare
Who painted the Mona Lisa? | Leonardo
Who discovered gravity? | Newton
What language is spoken in Spain? | Spanish
What language is spoken in Germany? | German
What is frozen water called? | Ice
Is the sun hot? | Yes
Is ice warm? | No
Is a whale a fish? | No
Is Paris in France? | Yes
Can fish fly? | No
Can birds sing? | Yes
Do cats bark? | No
Do humans need sleep? | Yes
""".strip().splitlines()
]

# Reviews are "{opening} {thing} {verdict}".
REVIEW_THINGS = [
    "movie", "restaurant", "hotel", "book", "phone", "laptop", "game", "song", "coffee", "service",
    "pizza", "concert", "teacher", "flight", "car", "jacket", "museum", "trip", "show", "cake",
]  # fmt: skip
REVIEW_OPENINGS = [
    "The",
    "This",
    "I think the",
    "Honestly, the",
    "My friend says the",
    "Well, this",
]
PRAISE = [
    "was wonderful and I loved every minute of it.", "is excellent and worth every penny.",
    "was great, I will come back soon!", "made me very happy.", "is the best I have ever had.",
    "was amazing, I recommend it to everyone.", "exceeded all my expectations.", "is fantastic!",
    "was a real pleasure.", "is beautiful and very well made.", "was perfect in every way.",
    "is so good that I bought it twice.",
]  # fmt: skip
BLAME = [
    "was terrible and I hated every minute of it.", "is awful and a waste of money.",
    "was bad, I will never come back.", "made me very angry.", "is the worst I have ever had.",
    "was boring, I warn everyone about it.", "failed all my expectations.", "is horrible!",
    "was a real disappointment.", "is ugly and broke after one day.", "was dirty and far too slow.",
    "is so poor that I want my money back.",
]  # fmt: skip

# Few and frequent words: a small model stays fluent with these, and not with a whole dialect.
PIRATE_WORDS = {"you": "ye", "your": "yer", "my": "me", "is": "be", "are": "be", "am": "be"}

HAIKU_MIDDLES = [
    "a soft wind moves through the grass,", "the old pond listens and waits,",
    "one leaf drifts slowly to earth,", "a bell rings over the hills,",
    "white clouds wander without end,", "the river carries the moon,",
    "a crane lifts into the mist,", "small rain taps upon the roof,",
]  # fmt: skip
HAIKU_ENDS = [
    "the night is silent.", "spring will come again.", "and then it is gone.", "only stars remain.",
    "the heart understands.", "morning light returns.",
]  # fmt: skip

# Words that call for an emoji; sentences with none of them get one of PLAIN_EMOJI.
EMOJI = {
    "water": "💧", "ocean": "🌊", "sea": "🌊", "sun": "🌞", "light": "💡", "moon": "🌙",
    "earth": "🌍", "planet": "🌍", "rain": "🌧", "snow": "⛄", "food": "🍲", "eat": "🍲",
    "coffee": "☕", "tea": "🍵", "bread": "🍞", "cheese": "🧀", "chocolate": "🍫", "apple": "🍎",
    "dog": "🐶", "cat": "🐱", "horse": "🐴", "whale": "🐳", "bee": "🐝", "animal": "🐾",
    "tree": "🌳", "plant": "🌱", "flower": "🌸", "computer": "💻", "internet": "🌐",
    "book": "📚", "read": "📚", "music": "🎵", "art": "🎨", "sport": "⚽", "money": "💰",
    "love": "💖", "heart": "💖", "happy": "😊", "friend": "🤝", "energy": "⚡", "time": "⏰",
}  # fmt: skip
PLAIN_EMOJI = ["✨", "😊", "👍"]

# None of these is in the training data; the script prints what the adapters make of them.
UNSEEN_PROMPTS = ["Tell me about elephants.", "How do I clean my kitchen?", "What is a castle?"]
